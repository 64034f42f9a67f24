package policy

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	gojson "encoding/json"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	yamlv3 "go.yaml.in/yaml/v3"
	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/procession-dev/procession/api/v1alpha1"
	"github.com/procession-dev/procession/internal/policy/celenv"
)

// Bounds of a file.
const (
	MaxFileBytes = 1 << 20 // bytes in a file
	maxDocuments = 64      // policies in a file
)

// An Object is a policy as it was written: decoded and not yet checked.
type Object struct {
	File   string // as the caller named it
	Line   int    // where it begins in the file, from 1
	Digest string // SHA-256 of its text, in hex
	Policy v1alpha1.Policy

	lines map[string]int // line in the file by path of the field
}

func digest(text []byte) string {
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

// FullName names the policy among all of a node, for people as well: NAME for
// policies of the cluster, NAMESPACE/NAME for others.
func (o *Object) FullName() string { return fullName(o.Policy.GetNamespace(), o.Policy.GetName()) }

func fullName(namespace, name string) string {
	if namespace == "" {
		return name
	}
	return namespace + "/" + name
}

// Parse reads the policies in a file: YAML or JSON, several documents
// separated by "---". It is strict: a field that is not known, that stands
// there twice or that has another type is an error. Policies that could be
// read are returned also when there are errors, which are of type Errors.
func Parse(file string, data []byte) ([]*Object, error) {
	if len(data) > MaxFileBytes {
		return nil, Errors{{File: file, Msg: fmt.Sprintf("the file has %d bytes; at most %d are allowed", len(data), MaxFileBytes)}}
	}
	var objects []*Object
	var errs Errors
	docs := documents(data)
	if len(docs) > maxDocuments {
		return nil, Errors{{File: file, Msg: fmt.Sprintf("the file has %d documents; at most %d are allowed", len(docs), maxDocuments)}}
	}
	for _, d := range docs {
		o, problems := d.parse(file)
		errs = append(errs, problems...)
		if len(problems) == 0 && o != nil {
			objects = append(objects, o)
		}
	}
	if len(objects) == 0 && len(errs) == 0 {
		return nil, Errors{{File: file, Msg: "there is no policy in the file"}}
	}
	if len(errs) > maxErrors {
		errs = errs[:maxErrors]
	}
	return objects, errs.orNil()
}

// A document is one part of a file.
type document struct {
	text []byte
	line int // of its first line in the file, from 1
}

// documents splits at lines that start with "---", as kubectl does. Such a
// line cannot be part of a value: there it would be indented.
func documents(data []byte) []document {
	var docs []document
	start, startLine, line := 0, 1, 1
	add := func(end int) {
		if text := data[start:end]; !blank(text) {
			docs = append(docs, document{text, startLine})
		}
	}
	for at := 0; at < len(data); line++ {
		end := len(data)
		if i := bytes.IndexByte(data[at:], '\n'); i >= 0 {
			end = at + i + 1
		}
		if isSeparator(data[at:end]) {
			add(at)
			start, startLine = end, line+1
		}
		at = end
	}
	add(len(data))
	return docs
}

func isSeparator(line []byte) bool {
	rest, ok := bytes.CutPrefix(line, []byte("---"))
	return ok && (len(bytes.TrimSpace(rest)) == 0 || rest[0] == ' ' && bytes.HasPrefix(bytes.TrimSpace(rest), []byte("#")))
}

// blank says whether there is nothing but comments.
func blank(text []byte) bool {
	for l := range bytes.Lines(text) {
		if l = bytes.TrimSpace(l); len(l) > 0 && l[0] != '#' {
			return false
		}
	}
	return true
}

func (d document) parse(file string) (*Object, Errors) {
	fail := func(format string, args ...any) (*Object, Errors) {
		msg := fmt.Sprintf(format, args...)
		return nil, Errors{{File: file, Line: d.line, Msg: msg}}
	}
	asJSON, err := yaml.YAMLToJSONStrict(d.text)
	if err != nil {
		msg, line := d.yamlError(err)
		return nil, Errors{{File: file, Line: line, Msg: msg}}
	}
	if !bytes.HasPrefix(asJSON, []byte("{")) {
		return fail("a policy is an object with apiVersion, kind, metadata and spec")
	}
	o := &Object{File: file, Line: d.line, Digest: digest(bytes.TrimSpace(d.text)), lines: d.positions()}
	var meta struct {
		APIVersion any `json:"apiVersion"`
		Kind       any `json:"kind"`
		Metadata   struct {
			Name      any `json:"name"`
			Namespace any `json:"namespace"`
		} `json:"metadata"`
	}
	// Errors in here are found again, and told, below.
	_ = json.UnmarshalCaseSensitivePreserveInts(asJSON, &meta)
	name, _ := meta.Metadata.Name.(string)
	if ns, _ := meta.Metadata.Namespace.(string); name != "" {
		name = fullName(ns, name)
	}
	at := func(field, format string, args ...any) *Error {
		return &Error{File: file, Line: o.line(field), Policy: name, Field: field, Msg: fmt.Sprintf(format, args...)}
	}
	const kinds = v1alpha1.KindClusterDetectionPolicy + " or " + v1alpha1.KindDetectionPolicy
	kind, _ := meta.Kind.(string)
	p, known := v1alpha1.NewPolicy(kind)
	switch {
	case meta.Kind == nil:
		return nil, Errors{at("kind", "is missing; it must be %s", kinds)}
	case v1alpha1.NotYetKind(kind):
		return nil, Errors{at("kind", "%s is not supported yet; only %s is", kind, kinds)}
	case !known:
		return nil, Errors{at("kind", "is %.64q; it must be %s", fmt.Sprint(meta.Kind), kinds)}
	case meta.APIVersion != v1alpha1.APIVersion:
		return nil, Errors{at("apiVersion", "is %.64q; it must be %s", fmt.Sprint(meta.APIVersion), v1alpha1.APIVersion)}
	}
	o.Policy = p
	strict, err := json.UnmarshalStrict(asJSON, p)
	if err != nil {
		return nil, Errors{o.typeError(name, err)}
	}
	var errs Errors
	for _, e := range strict {
		errs = append(errs, o.strictError(e))
	}
	return o, errs
}

var yamlLine = regexp.MustCompile(`^(?:yaml: )?(?:unmarshal errors:\s*)?line (\d+): `)

// yamlError takes the line out of the parser's message: it counts from the
// document's beginning.
func (d document) yamlError(err error) (msg string, line int) {
	msg, line = strings.TrimPrefix(err.Error(), "error converting YAML to JSON: "), d.line
	if m := yamlLine.FindStringSubmatch(msg); m != nil {
		if n, err := strconv.Atoi(m[1]); err == nil {
			line, msg = d.line+n-1, msg[len(m[0]):]
		}
	}
	if len(msg) > 512 {
		msg = strings.ToValidUTF8(msg[:512], "") + " …"
	}
	return "this is not YAML as expected: " + strings.ReplaceAll(strings.TrimPrefix(msg, "yaml: "), "\n", " "), line
}

// positions finds the line of every field. It is a help for error messages:
// where it fails there are no lines.
func (d document) positions() map[string]int {
	var root yamlv3.Node
	if err := yamlv3.Unmarshal(d.text, &root); err != nil || len(root.Content) != 1 {
		return nil
	}
	lines := map[string]int{}
	var walk func(n *yamlv3.Node, path string)
	walk = func(n *yamlv3.Node, path string) {
		switch n.Kind {
		case yamlv3.MappingNode:
			for i := 0; i+1 < len(n.Content); i += 2 {
				p := n.Content[i].Value
				if path != "" {
					p = path + "." + p
				}
				lines[p] = d.line + n.Content[i].Line - 1
				walk(n.Content[i+1], p)
			}
		case yamlv3.SequenceNode:
			for i, c := range n.Content {
				p := fmt.Sprintf("%s[%d]", path, i)
				lines[p] = d.line + c.Line - 1
				if c.Kind != yamlv3.ScalarNode {
					walk(c, p)
				}
			}
		}
	}
	walk(root.Content[0], "")
	return lines
}

// line finds the line of a field, or of the nearest one around it.
func (o *Object) line(field string) int {
	for field != "" {
		if n, ok := o.lines[field]; ok {
			return n
		}
		field = field[:max(0, strings.LastIndexAny(field, ".["))]
	}
	return o.Line
}

// ruleOf is the name of the rule a field belongs to.
func (o *Object) ruleOf(field string) string {
	rest, ok := strings.CutPrefix(field, "spec.rules[")
	if !ok || o.Policy == nil {
		return ""
	}
	digits, _, _ := strings.Cut(rest, "]")
	i, err := strconv.Atoi(digits)
	if rules := o.Policy.Body().Rules; err == nil && i >= 0 && i < len(rules) {
		return rules[i].Name
	}
	return ""
}

func (o *Object) problem(field, format string, args ...any) *Error {
	return &Error{File: o.File, Line: o.line(field), Policy: o.FullName(), Rule: o.ruleOf(field), Field: field,
		Msg: fmt.Sprintf(format, args...)}
}

// typeError is about a field that holds something of another type. The
// decoder knows the field's name and not which element of a list it is in.
func (o *Object) typeError(policy string, err error) *Error {
	e := &Error{File: o.File, Line: o.Line, Policy: policy, Msg: err.Error()}
	var te *gojson.UnmarshalTypeError
	if errors.As(err, &te) {
		e.Field = strings.ReplaceAll(te.Field, ".PolicySpec.", ".") // which stands inline
		e.Line = o.line(e.Field)
		is, ok := map[string]string{"array": "a list", "string": "text", "object": "an object", "bool": "true or false"}[te.Value]
		if !ok {
			is = "a number"
		}
		e.Msg = fmt.Sprintf("is %s; it must be %s", is, goType(te.Type))
		if te.Type.Kind() == reflect.String {
			e.Msg += "; numbers and yes, no, on, off need quotes to be text"
		}
	}
	var pe *time.ParseError
	if errors.As(err, &pe) {
		e.Msg = fmt.Sprintf("%.64q is no time; write it like 2027-06-30T00:00:00Z", pe.Value)
		e.Field = "spec.rules.exceptions.expiresAt" // the only time in a spec; the decoder does not say which rule's
	}
	if len(e.Msg) > 512 {
		e.Msg = strings.ToValidUTF8(e.Msg[:512], "") + " …"
	}
	return e
}

func goType(t reflect.Type) string {
	switch t.Kind() {
	case reflect.String:
		return "text"
	case reflect.Slice:
		return "a list"
	case reflect.Struct, reflect.Map, reflect.Pointer:
		return "an object"
	case reflect.Bool:
		return "true or false"
	}
	return "a number"
}

var strictField = regexp.MustCompile(`^(unknown|duplicate) field "(.*)"$`)

// strictError explains a field that is not known.
func (o *Object) strictError(err error) *Error {
	m := strictField.FindStringSubmatch(err.Error())
	if m == nil {
		return o.problem("", "%s", err)
	}
	field := m[2]
	if m[1] == "duplicate" {
		return o.problem(field, "stands here twice")
	}
	last := field[strings.LastIndexByte(field, '.')+1:]
	if instead, ok := v1alpha1.NotYet(last); ok {
		return o.problem(field, "is not supported yet; until then: %s", instead)
	}
	hint := "there are no others than the ones in api/v1alpha1/types.go"
	if names := fieldNames(reflect.TypeOf(o.Policy).Elem(), field); names != nil {
		hint = celenv.Meant(last, names)
		if !strings.HasPrefix(hint, "did you mean") {
			hint = "known here: " + strings.Join(names, ", ")
		}
	}
	return o.problem(field, "is not known; %s", hint)
}

var index = regexp.MustCompile(`\[\d+\]`)

// fieldNames lists the fields next to the one with this path in t.
func fieldNames(t reflect.Type, path string) []string {
	parts := strings.Split(index.ReplaceAllString(path, ""), ".")
	for _, part := range parts[:len(parts)-1] {
		f, ok := jsonField(t, part)
		if !ok {
			return nil
		}
		t = f.Type
		for t.Kind() == reflect.Slice || t.Kind() == reflect.Pointer {
			t = t.Elem()
		}
		if t.Kind() != reflect.Struct {
			return nil
		}
	}
	var names []string
	for _, f := range jsonFields(t) {
		names = append(names, jsonName(f))
	}
	slices.Sort(names)
	return names
}

func jsonField(t reflect.Type, name string) (reflect.StructField, bool) {
	for _, f := range jsonFields(t) {
		if jsonName(f) == name {
			return f, true
		}
	}
	return reflect.StructField{}, false
}

// jsonFields lists the fields of a struct, those of inlined ones with them.
func jsonFields(t reflect.Type) (fields []reflect.StructField) {
	for i := range t.NumField() {
		f := t.Field(i)
		if f.Anonymous && jsonName(f) == "" {
			fields = append(fields, jsonFields(f.Type)...)
		} else {
			fields = append(fields, f)
		}
	}
	return fields
}

func jsonName(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
	return name
}
