package collector

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/sink"
	"github.com/procession-dev/procession/internal/store"
)

func TestReadSinks(t *testing.T) {
	file := filepath.Join(t.TempDir(), "sinks.yaml")
	text := `
sinks:
- name: siem
  webhook: {url: "https://siem.example/in", timeout: 20s, headers: {X-Team: soc}}
- name: slack
  webhook: {urlFile: /etc/procession/slack, format: slack}
  kinds: [alert, loss]
  minSeverity: high
  rules: ["*/*/shells/*"]
  namespaces: [shop, "team-*"]
  dryRun: true
  from: now
`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := ReadSinks(file)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || got[0].Name != "siem" || got[1].From != "now" || got[1].Webhook.Format != "slack" {
		t.Errorf("read %+v", got)
	}
	want := sink.Filter{Kinds: []store.Kind{store.Alert, store.Loss}, MinSeverity: pb.Severity_SEVERITY_HIGH, DryRun: true,
		Rules: []string{"*/*/shells/*"}, Namespaces: []string{"shop", "team-*"}}
	if d := cmp.Diff(want, got[1].filter); d != "" {
		t.Errorf("filter (-want +got):\n%s", d)
	}
	if _, err := got[0].open("c"); err != nil {
		t.Error(err)
	}
}

// Whatever is wrong, the error says at which key.
func TestSinksErrors(t *testing.T) {
	hook := `webhook: {url: "https://x.example"}`
	for text, want := range map[string]string{
		"":                                      "sinks: empty",
		"sinks: [":                              "yaml",
		"sink: []":                              `unknown field "sink"`,
		"sinks: [{name: a, webhok: {}}]":        `unknown field "sinks[0].webhok"`,
		"sinks: [{name: a, webhook: {url: 5}}]": "url",
		"sinks: [{name: A, " + hook + "}]":      "sinks[0].name: ",
		"sinks: [{name: ndjson, " + hook + "}]": "sinks[0].name: ndjson is taken",
		"sinks: [{name: a}]":                    "sinks[0].webhook: is missing",
		"sinks: [{name: a, " + hook + "}, {name: a, " + hook + "}]":                             "sinks[1].name: \"a\" is there twice",
		"sinks: [{name: a, " + hook + ", kinds: [alert, alerts]}]":                              "sinks[0].kinds[1]: \"alerts\"",
		"sinks: [{name: a, " + hook + ", minSeverity: bad}]":                                    "sinks[0].minSeverity: ",
		"sinks: [{name: a, " + hook + ", rules: [\"[\"]}]":                                      "sinks[0].rules[0]: ",
		"sinks: [{name: a, " + hook + ", from: monday}]":                                        "sinks[0].from: ",
		"sinks: [" + strings.Repeat("{name: a, "+hook+"}, ", 65) + "]":                          "sinks: 65, limit 64",
		"sinks: [{name: a, name: b, " + hook + "}]":                                             "name",
		"sinks: [{name: a, webhook: {url: \"https://x.example\", url: \"https://y.example\"}}]": "url",
	} {
		if _, err := parseSinks([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, want %q", text, err, want)
		}
	}
	for text, want := range map[string]string{
		"{url: \"http://x.example\"}":                 "webhook.url: http is not encrypted",
		"{url: \"https://x.example\", timeout: soon}": "webhook.timeout: ",
		"{url: \"https://x.example\", format: xml}":   "webhook.format: ",
		"{url: \"https://x.example\", caFile: /none}": "webhook.caFile: ",
		"{urlFile: /none}":                            "webhook.urlFile: ",
	} {
		s, err := parseSinks([]byte("sinks: [{name: a, webhook: " + text + "}]"))
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if _, err := s[0].open("c"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

func FuzzSinks(f *testing.F) {
	f.Add([]byte("sinks: [{name: a, webhook: {url: \"https://x.example\"}, kinds: [alert]}]"))
	f.Add([]byte("sinks:\n- name: b\n  rules: ['*']\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		sinks, err := parseSinks(b)
		if err != nil {
			if err.Error() == "" {
				t.Error("an error without a word")
			}
			return
		}
		for _, s := range sinks {
			if s.Webhook == nil || !sinkName.MatchString(s.Name) || s.filter.Check() != nil {
				t.Errorf("accepted %+v", s)
			}
		}
	})
}
