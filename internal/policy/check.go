package policy

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/procession-dev/procession/api/v1alpha1"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
)

// A checker holds a policy to the limits of v1alpha1. The API server checks
// the same by the CRD's schema; files have nobody else.
type checker struct {
	o    *Object
	errs Errors
}

func (c *checker) problem(field, format string, args ...any) {
	if len(c.errs) < maxErrors {
		c.errs = append(c.errs, c.o.problem(field, format, args...))
	}
}

var (
	objectName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	ruleName   = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)
	identifier = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_]*$`)
	labelText  = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$`)
	windowForm = regexp.MustCompile(`^([0-9]+(s|m|h))+$`)
	tactic     = regexp.MustCompile(`^[a-z]+(-[a-z]+)*$`)
	technique  = regexp.MustCompile(`^T[0-9]{4}(\.[0-9]{3})?$`)
)

// reserved words of CEL cannot be names in an expression.
var reserved = []string{"as", "break", "const", "continue", "else", "false", "for", "function", "if", "import", "in", "let",
	"loop", "namespace", "null", "package", "return", "true", "var", "void", "while"}

func (c *checker) policy() {
	p := c.o.Policy
	c.meta(p)
	s := p.Body()
	oneOf(c, "spec.mode", s.Mode, "", v1alpha1.ModeAlert, v1alpha1.ModeDryRun, v1alpha1.ModeDisabled)
	c.scope("spec.scope", p.Where())
	if l := s.RateLimit; l != nil {
		c.within("spec.rateLimit.alerts", int(l.Alerts), 1, v1alpha1.MaxRateAlerts)
		c.window("spec.rateLimit.window", l.Window)
	}
	c.count("spec.lists", len(s.Lists), v1alpha1.MaxLists)
	names := map[string]bool{}
	for i := range s.Lists {
		c.list(fmt.Sprintf("spec.lists[%d]", i), &s.Lists[i], names)
	}
	c.count("spec.variables", len(s.Variables), v1alpha1.MaxVariables)
	names = map[string]bool{}
	for i, v := range s.Variables {
		c.name(fmt.Sprintf("spec.variables[%d].name", i), v.Name, identifier, "a letter, then letters, digits and '_'", names)
	}
	if len(s.Rules) == 0 {
		c.problem("spec.rules", "is empty; there must be at least one rule")
	}
	c.count("spec.rules", len(s.Rules), v1alpha1.MaxRules)
	names = map[string]bool{}
	for i := range s.Rules {
		c.rule(fmt.Sprintf("spec.rules[%d]", i), &s.Rules[i], names)
	}
}

func (c *checker) meta(p v1alpha1.Policy) {
	switch name := p.GetName(); {
	case name == "":
		c.problem("metadata.name", "is missing")
	case len(name) > 253 || !objectName.MatchString(name):
		c.problem("metadata.name", "is %.80q; it must be lower-case letters, digits, '-' and '.', at most 253", name)
	}
	namespaced := p.PolicyKind() == v1alpha1.KindDetectionPolicy
	switch ns := p.GetNamespace(); {
	case namespaced && ns == "":
		c.problem("metadata.namespace", "is missing; a %s is about the pods of its namespace", p.PolicyKind())
	case namespaced && (len(ns) > 63 || !ruleName.MatchString(ns)):
		c.problem("metadata.namespace", "is %.80q; it must be lower-case letters, digits and '-', at most 63", ns)
	case !namespaced && ns != "":
		c.problem("metadata.namespace", "is set; a %s is in no namespace", p.PolicyKind())
	}
}

func (c *checker) scope(field string, s *v1alpha1.Scope) {
	for i, t := range s.Targets {
		at := fmt.Sprintf("%s.targets[%d]", field, i)
		oneOf(c, at, t, v1alpha1.TargetContainers, v1alpha1.TargetHost)
		if slices.Contains(s.Targets[:i], t) {
			c.problem(at, "%s stands here twice", t)
		}
	}
	c.selector(field+".namespaceSelector", s.NamespaceSelector)
	c.selector(field+".podSelector", s.PodSelector)
	c.selector(field+".nodeSelector", s.NodeSelector)
	c.count(field+".containers", len(s.Containers), v1alpha1.MaxContainers)
	names := map[string]bool{}
	for i, n := range s.Containers {
		c.name(fmt.Sprintf("%s.containers[%d]", field, i), n, ruleName, "lower-case letters, digits and '-'", names)
	}
	if len(s.Targets) > 0 && !slices.Contains(s.Targets, v1alpha1.TargetContainers) &&
		(s.NamespaceSelector != nil || s.PodSelector != nil || len(s.Containers) > 0) {
		c.problem(field, "selects namespaces, pods or containers, and its targets are hosts alone")
	}
}

func (c *checker) selector(field string, s *v1alpha1.Selector) {
	if s == nil {
		return
	}
	c.count(field+".matchLabels", len(s.MatchLabels), v1alpha1.MaxSelector)
	for key, value := range s.MatchLabels {
		c.label(field+".matchLabels", key, value)
	}
	c.count(field+".matchExpressions", len(s.MatchExpressions), v1alpha1.MaxSelector)
	for i, r := range s.MatchExpressions {
		at := fmt.Sprintf("%s.matchExpressions[%d]", field, i)
		c.label(at+".key", r.Key)
		oneOf(c, at+".operator", r.Operator, v1alpha1.OpIn, v1alpha1.OpNotIn, v1alpha1.OpExists, v1alpha1.OpDoesNotExist)
		c.count(at+".values", len(r.Values), v1alpha1.MaxSelectorValues)
		takes := r.Operator == v1alpha1.OpIn || r.Operator == v1alpha1.OpNotIn
		if takes != (len(r.Values) > 0) {
			c.problem(at+".values", "In and NotIn take values, Exists and DoesNotExist take none")
		}
		for _, v := range r.Values {
			c.label(at+".values", r.Key, v)
		}
	}
}

// label checks a label's key and values by Kubernetes' rules: no pod can have
// another, and a selector for one selects nothing.
func (c *checker) label(field, key string, values ...v1alpha1.LabelValue) {
	prefix, name, ok := strings.Cut(key, "/")
	if !ok {
		prefix, name = "", key
	}
	if len(name) > 63 || !labelText.MatchString(name) || ok && (len(prefix) > 253 || !objectName.MatchString(prefix)) {
		c.problem(field, "%.80q is not the key of a label", key)
	}
	for _, v := range values {
		if len(v) > 63 || v != "" && !labelText.MatchString(string(v)) {
			c.problem(field, "%.80q is not the value of a label", string(v))
		}
	}
}

// within checks the bounds of a number.
func (c *checker) within(field string, n, least, most int) {
	if n < least || n > most {
		c.problem(field, "is %d; it must be from %d to %d", n, least, most)
	}
}

// window checks a length of time.
func (c *checker) window(field, text string) {
	switch d, err := time.ParseDuration(text); {
	case text == "":
		c.problem(field, "is missing; write it like 5m")
	case err != nil || len(text) > 16 || !windowForm.MatchString(text):
		c.problem(field, "is %.32q; write it in whole hours, minutes and seconds, like 90s or 1h30m", text)
	case d < v1alpha1.MinWindow || d > v1alpha1.MaxWindow:
		c.problem(field, "is %s; it must be from 1s to 24h", text)
	}
}

// keys checks the expressions that matches are counted by; what is in them is
// the compiler's affair.
func (c *checker) keys(field string, by []string) {
	c.count(field, len(by), v1alpha1.MaxKeys)
	for i, k := range by {
		if len(k) > v1alpha1.MaxKeyBytes {
			c.problem(fmt.Sprintf("%s[%d]", field, i), "has %d bytes; at most %d are allowed", len(k), v1alpha1.MaxKeyBytes)
		}
	}
}

func (c *checker) list(field string, l *v1alpha1.List, names map[string]bool) {
	c.name(field+".name", l.Name, identifier, "a letter, then letters, digits and '_'", names)
	if len(l.Values) == 0 {
		c.problem(field+".values", "is empty; a list has at least one value")
	}
	c.count(field+".values", len(l.Values), v1alpha1.MaxListValues)
	for i, v := range l.Values {
		switch {
		case v == "":
			c.problem(fmt.Sprintf("%s.values[%d]", field, i), "is empty; every text contains the empty one, which is hardly meant")
		case len(v) > v1alpha1.MaxListValueBytes:
			c.problem(fmt.Sprintf("%s.values[%d]", field, i), "has %d bytes; at most %d are allowed", len(v), v1alpha1.MaxListValueBytes)
		}
	}
}

func (c *checker) events(field string, r *v1alpha1.Rule) {
	if len(r.Events) == 0 {
		c.problem(field, "is empty; the rule would never be evaluated")
	}
	for i, k := range r.Events {
		at := fmt.Sprintf("%s[%d]", field, i)
		if kind, ok := event.KindByName(string(k)); !ok || kind.String() != string(k) {
			var names []string
			for _, k := range event.AllKinds() {
				names = append(names, k.String())
			}
			c.problem(at, "%.64q is not a kind of event; %s", string(k), hint(string(k), names))
		}
		if slices.Contains(r.Events[:i], k) {
			c.problem(at, "%s stands here twice", k)
		}
	}
}

func (c *checker) rule(field string, r *v1alpha1.Rule, names map[string]bool) {
	c.name(field+".name", r.Name, ruleName, "lower-case letters, digits and '-'", names)
	c.events(field+".events", r)
	if t := r.Threshold; t != nil {
		c.keys(field+".threshold.by", t.By)
		c.within(field+".threshold.count", int(t.Count), v1alpha1.MinThreshold, v1alpha1.MaxThreshold)
		c.window(field+".threshold.window", t.Window)
	}
	if a := r.Aggregate; a != nil {
		c.keys(field+".aggregate.by", a.By)
		c.window(field+".aggregate.window", a.Window)
	}
	if r.Severity == "" {
		c.problem(field+".severity", "is missing; it must be Critical, High, Medium, Low or Informational")
	} else {
		oneOf(c, field+".severity", r.Severity, v1alpha1.SeverityCritical, v1alpha1.SeverityHigh, v1alpha1.SeverityMedium,
			v1alpha1.SeverityLow, v1alpha1.SeverityInformational)
	}
	oneOf(c, field+".onUndecided", r.OnUndecided, "", v1alpha1.UndecidedSkip, v1alpha1.UndecidedAlert)
	oneOf(c, field+".mode", r.Mode, "", v1alpha1.ModeAlert, v1alpha1.ModeDryRun, v1alpha1.ModeDisabled)
	if r.Message != "" && r.MessageExpression != "" {
		c.problem(field+".messageExpression", "stands beside message; only one of them is allowed")
	}
	c.texts(field, map[string]string{"title": r.Title, "description": r.Description, "message": r.Message, "license": r.License})
	if strings.ContainsAny(r.Title, "\n\r") {
		c.problem(field+".title", "has several lines; it must be one")
	}
	for name, items := range map[string][]string{"tags": r.Tags, "references": r.References, "authors": r.Authors, "falsePositives": r.FalsePositives} {
		c.count(field+"."+name, len(items), v1alpha1.MaxItems)
		for i, x := range items {
			c.texts(fmt.Sprintf("%s.%s[%d]", field, name, i), map[string]string{"": x})
		}
	}
	c.count(field+".mitre", len(r.Mitre), v1alpha1.MaxItems)
	for i, m := range r.Mitre {
		at := fmt.Sprintf("%s.mitre[%d]", field, i)
		if m.Tactic != "" && !tactic.MatchString(m.Tactic) {
			c.problem(at+".tactic", "is %.64q; it must be in ATT&CK's short form, like privilege-escalation", m.Tactic)
		}
		if !technique.MatchString(m.Technique) {
			c.problem(at+".technique", "is %.64q; it must be like T1059 or T1059.004", m.Technique)
		}
	}
	if s := r.Source; s != nil {
		if s.Format == "" {
			c.problem(field+".source.format", "is missing")
		}
		if strings.EqualFold(s.Format, "Sigma") && (len(r.Authors) == 0 || r.License == "") {
			c.problem(field+".source", "is Sigma; authors and license must be given, the licence of Sigma rules asks for it")
		}
	}
	c.count(field+".exceptions", len(r.Exceptions), v1alpha1.MaxExceptions)
	exceptions := map[string]bool{}
	for i, x := range r.Exceptions {
		at := fmt.Sprintf("%s.exceptions[%d]", field, i)
		c.name(at+".name", x.Name, ruleName, "lower-case letters, digits and '-'", exceptions)
		if n := utf8.RuneCountInString(strings.TrimSpace(x.Reason)); n < v1alpha1.MinReason {
			c.problem(at+".reason", "has %d characters; say why in at least %d", n, v1alpha1.MinReason)
		}
		c.texts(at, map[string]string{"reason": x.Reason})
	}
}

func (c *checker) name(field, name string, form *regexp.Regexp, what string, seen map[string]bool) {
	switch {
	case name == "":
		c.problem(field, "is missing")
	case len(name) > v1alpha1.MaxNameBytes || !form.MatchString(name):
		c.problem(field, "is %.80q; it must be %s, at most %d", name, what, v1alpha1.MaxNameBytes)
	case form == identifier && slices.Contains(reserved, name):
		c.problem(field, "%s is a reserved word", name)
	case seen[name]:
		c.problem(field, "%s is the name of another one as well", name)
	}
	seen[name] = true
}

func (c *checker) count(field string, n, limit int) {
	if n > limit {
		c.problem(field, "has %d elements; at most %d are allowed", n, limit)
	}
}

func (c *checker) texts(field string, texts map[string]string) {
	for name, t := range texts {
		at := strings.TrimSuffix(field+"."+name, ".")
		if len(t) > v1alpha1.MaxTextBytes {
			c.problem(at, "has %d bytes; at most %d are allowed", len(t), v1alpha1.MaxTextBytes)
		}
		if !utf8.ValidString(t) {
			c.problem(at, "is not valid UTF-8")
		}
	}
}

// oneOf checks an enumeration; the empty word is allowed where it is listed.
func oneOf[T ~string](c *checker, field string, got T, allowed ...T) {
	if slices.Contains(allowed, got) {
		return
	}
	var names []string
	for _, a := range allowed {
		if a != "" {
			names = append(names, string(a))
		}
	}
	c.problem(field, "is %.64q; %s", string(got), hint(string(got), names))
}

// hint names the one that was meant, or all there are.
func hint(got string, names []string) string {
	for _, n := range names {
		if strings.EqualFold(n, got) {
			return "did you mean " + n + "?"
		}
	}
	if h := celenv.Meant(got, names); strings.HasPrefix(h, "did you mean") {
		return h
	}
	return "it must be one of " + strings.Join(names, ", ")
}
