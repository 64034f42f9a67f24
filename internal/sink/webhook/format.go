package webhook

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/present"
	"github.com/procession-dev/procession/internal/sink"
	"github.com/procession-dev/procession/internal/store"
)

// A Format is how a record is written into a request.
type Format string

// Formats a Webhook can send.
const (
	JSON         Format = "json"         // as docs/events.md has it
	Falco        Format = "falco"        // as Falco's http_output: falcosidekick and what reads Falco
	Slack        Format = "slack"        // an incoming webhook's message
	Alertmanager Format = "alertmanager" // POST /api/v2/alerts
)

// Formats names them all.
func Formats() []string {
	return []string{string(JSON), string(Falco), string(Slack), string(Alertmanager)}
}

func (f Format) known() bool { return f == JSON || f == Falco || f == Slack || f == Alertmanager }

// Append appends a record, as JSON, to dst.
func (f Format) Append(dst []byte, cluster string, r *store.Record) []byte {
	var v any
	switch f {
	case Falco:
		v = falco(cluster, r)
	case Slack:
		v = slack(cluster, r)
	case Alertmanager:
		v = []amAlert{alertmanager(cluster, r)}
	default:
		return sink.AppendJSON(dst, cluster, r)
	}
	b, err := json.Marshal(v)
	if err != nil { // strings, numbers and times: cannot be
		panic(err)
	}
	return append(dst, b...)
}

// A subject is what the formats say about any record.
type subject struct {
	alert     *pb.Alert // nil for other kinds
	rule      string    // short name
	severity  pb.Severity
	time      time.Time
	line      string // without control characters
	namespace string
	pod       string
	container string
	dryRun    bool // of a rule that is only tried out
}

func subjectOf(cluster string, r *store.Record) subject {
	line := sink.AppendLine(nil, present.Style{Layout: time.RFC3339}, cluster, r)
	s := subject{time: r.Received, line: string(line), severity: pb.Severity_SEVERITY_MEDIUM}
	var it pb.Item
	if r.Kind == store.Alert || r.Kind == store.Amendment || r.Kind == store.Coverage || r.Kind == store.DryRun {
		if proto.Unmarshal(r.Payload, &it) != nil {
			it.Reset()
		}
	}
	if !r.EventTime.IsZero() {
		s.time = r.EventTime
	}
	switch {
	case it.GetAlert() != nil:
		s.alert, s.severity, s.dryRun = it.GetAlert(), it.GetAlert().GetSeverity(), it.GetAlert().GetDryRun()
		s.rule = shown(s.alert.GetRule())
		if i := strings.LastIndexByte(s.rule, '/'); i >= 0 {
			s.rule = s.rule[i+1:]
		}
		pod := s.alert.GetEvent().GetPod()
		s.namespace, s.pod = shown(pod.GetNamespace()), shown(pod.GetName())
		s.container = shown(s.alert.GetEvent().GetContainer().GetName())
	case it.GetAmendment() != nil:
		s.rule, s.severity = "alert-amended", pb.Severity_SEVERITY_INFORMATIONAL
		pod := it.GetAmendment().GetPod()
		s.namespace, s.pod = shown(pod.GetNamespace()), shown(pod.GetName())
	case it.GetCoverage() != nil:
		s.rule, s.severity = "node-coverage", pb.Severity_SEVERITY_INFORMATIONAL
	case r.Kind == store.Loss:
		s.rule = "alerts-lost"
	default:
		s.rule = "unreadable-record"
	}
	return s
}

// shown is text without what a screen acts on.
func shown(s string) string { return string(present.AppendPhrase(nil, []byte(s))) }

// falcoAlert is what Falco's json_output has, as falcosidekick reads it: output,
// priority, rule, time and output_fields must be there. It gives uuid a value of
// its own, so our id is a field.
type falcoAlert struct {
	Output   string         `json:"output"`
	Priority string         `json:"priority"`
	Rule     string         `json:"rule"`
	Time     time.Time      `json:"time"`
	Source   string         `json:"source"`
	Hostname string         `json:"hostname"`
	Tags     []string       `json:"tags"`
	Fields   map[string]any `json:"output_fields"`
}

func falco(cluster string, r *store.Record) falcoAlert {
	s := subjectOf(cluster, r)
	out := falcoAlert{Output: s.line, Priority: falcoPriority(s.severity), Rule: s.rule, Time: s.time.UTC(),
		Source: "syscall", Hostname: r.Node, Tags: []string{}, Fields: map[string]any{
			"alert.id": r.ID(cluster), "alert.seq": r.Seq, "k8s.cluster.name": cluster, "k8s.node.name": r.Node,
		}}
	// falcosidekick takes these for strings without asking.
	put := func(key, v string) {
		if v != "" {
			out.Fields[key] = v
		}
	}
	put("k8s.ns.name", s.namespace)
	put("k8s.pod.name", s.pod)
	put("container.name", s.container)
	if s.alert == nil {
		return out
	}
	a, ev := s.alert, s.alert.GetEvent()
	for _, m := range a.GetMitre() {
		out.Tags = append(out.Tags, shown(m.GetTechnique()))
	}
	for _, t := range a.GetTags() {
		out.Tags = append(out.Tags, shown(t))
	}
	put("alert.rule", shown(a.GetRule()))
	put("alert.message", shown(a.GetMessage()))
	if s.dryRun {
		put("alert.dry_run", "true")
	}
	put("evt.type", shown(ev.GetKind()))
	put("k8s.pod.uid", shown(ev.GetPod().GetUid()))
	put("container.id", shown(ev.GetContainer().GetId()))
	image := shown(ev.GetContainer().GetImage())
	if i := strings.LastIndexByte(image, ':'); i > strings.LastIndexByte(image, '/') {
		put("container.image.tag", image[i+1:])
		image = image[:i]
	}
	put("container.image.repository", image)
	p := ev.GetProcess()
	if p == nil {
		return out
	}
	out.Fields["proc.pid"] = p.GetPid()
	if p.Ppid != nil {
		out.Fields["proc.ppid"] = p.GetPpid()
	}
	if ids := p.GetIds(); ids != nil {
		out.Fields["user.uid"] = ids.GetEuid()
	}
	put("proc.exepath", shown(string(p.GetExe())))
	put("proc.name", shown(string(p.GetName())))
	put("proc.cmdline", commandLine(p))
	put("proc.cwd", shown(string(p.GetCwd())))
	if as := p.GetAncestors(); len(as) > 0 {
		put("proc.pname", shown(string(as[0].GetName())))
		put("proc.pexepath", shown(string(as[0].GetExe())))
	}
	return out
}

// commandLine has each argument as one word: none can pass for two.
func commandLine(p *pb.Process) string {
	if len(p.GetCmdline()) == 0 {
		return ""
	}
	var b []byte
	for arg := range bytes.SplitSeq(bytes.TrimSuffix(p.GetCmdline(), []byte{0}), []byte{0}) {
		b = append(present.AppendSafe(b, arg), ' ')
	}
	return string(b[:len(b)-1])
}

func falcoPriority(s pb.Severity) string {
	switch s {
	case pb.Severity_SEVERITY_CRITICAL:
		return "Critical"
	case pb.Severity_SEVERITY_HIGH:
		return "Error"
	case pb.Severity_SEVERITY_MEDIUM:
		return "Warning"
	case pb.Severity_SEVERITY_LOW:
		return "Notice"
	}
	return "Informational"
}

// severityWord is a severity in lower case, for labels.
func severityWord(s pb.Severity) string {
	if s <= pb.Severity_SEVERITY_INFORMATIONAL || s > pb.Severity_SEVERITY_CRITICAL {
		return "info"
	}
	return strings.ToLower(strings.TrimPrefix(s.String(), "SEVERITY_"))
}

type slackMessage struct {
	Text        string            `json:"text"`
	Attachments []slackAttachment `json:"attachments"`
}

type slackAttachment struct {
	Color  string       `json:"color"`
	Text   string       `json:"text"`
	Fields []slackField `json:"fields"`
	Footer string       `json:"footer"`
	TS     int64        `json:"ts"`
}

type slackField struct {
	Title string `json:"title"`
	Value string `json:"value"`
	Short bool   `json:"short"`
}

// slackText makes text that Slack shows as it is: no links, mentions or format.
var slackText = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", "`", "ˋ", "*", "∗", "_", "_\u200b", "~", "∼")

// maxSlack is where Slack would cut.
const maxSlack = 2500

func slack(cluster string, r *store.Record) slackMessage {
	s := subjectOf(cluster, r)
	color := map[pb.Severity]string{
		pb.Severity_SEVERITY_CRITICAL: "#8b0000", pb.Severity_SEVERITY_HIGH: "#d92d20",
		pb.Severity_SEVERITY_MEDIUM: "#f79009", pb.Severity_SEVERITY_LOW: "#2e90fa",
	}[s.severity]
	if color == "" {
		color = "#98a2b3"
	}
	title := s.rule
	if t := s.alert.GetTitle(); t != "" {
		title = shown(t)
	}
	if s.dryRun {
		title = "dry run: " + title
	}
	where := s.namespace + "/" + s.pod
	if s.pod == "" {
		where = "node " + r.Node
	}
	a := slackAttachment{Color: color, Text: "```" + slackText.Replace(cut(s.line, maxSlack)) + "```", Footer: r.ID(cluster), TS: s.time.Unix()}
	for _, f := range [][2]string{{"Rule", s.rule}, {"Severity", severityWord(s.severity)}, {"Node", r.Node}, {"Namespace", s.namespace}, {"Pod", s.pod}} {
		if f[1] != "" {
			a.Fields = append(a.Fields, slackField{f[0], slackText.Replace(cut(f[1], 200)), true})
		}
	}
	return slackMessage{Text: slackText.Replace(cut(strings.ToUpper(severityWord(s.severity))+": "+title+" ("+where+")", 500)), Attachments: []slackAttachment{a}}
}

// cut shortens s to about n bytes of whole characters, and says so.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "") + "…"
}

// amAlert is postableAlert of Alertmanager's API v2.
type amAlert struct {
	Labels      map[string]string `json:"labels"`
	Annotations map[string]string `json:"annotations"`
	StartsAt    time.Time         `json:"startsAt"`
}

func alertmanager(cluster string, r *store.Record) amAlert {
	s := subjectOf(cluster, r)
	labels := map[string]string{
		"alertname": s.rule, "severity": severityWord(s.severity), "cluster": cluster, "node": r.Node,
		// Two alerts are two: without it Alertmanager would take them for one.
		"alert_id": r.ID(cluster),
	}
	for k, v := range map[string]string{"namespace": s.namespace, "pod": s.pod, "container": s.container} {
		if v != "" {
			labels[k] = v
		}
	}
	if s.dryRun {
		labels["dry_run"] = "true"
	}
	out := amAlert{Labels: labels, Annotations: map[string]string{"description": cut(s.line, 16<<10), "seq": strconv.FormatUint(r.Seq, 10)}, StartsAt: s.time.UTC()}
	if s.alert != nil {
		if t := shown(s.alert.GetTitle()); t != "" {
			out.Annotations["summary"] = t
		}
		out.Annotations["rule"] = shown(s.alert.GetRule())
	}
	return out
}
