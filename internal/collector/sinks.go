package collector

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/sink"
	"github.com/procession-dev/procession/internal/sink/webhook"
	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/wholefile"
)

// A SinkConfig is one entry of the file of --sinks.
type SinkConfig struct {
	Name string `json:"name"` // of the cursor: keep it

	Webhook *WebhookConfig `json:"webhook"`

	// What is delivered; nothing set is everything but coverage and dry runs.
	Kinds       []string `json:"kinds"`
	MinSeverity string   `json:"minSeverity"`
	Rules       []string `json:"rules"`
	Namespaces  []string `json:"namespaces"`
	DryRun      bool     `json:"dryRun"`

	// From is where a new sink begins: oldest (the default) or now.
	From string `json:"from"`

	filter sink.Filter
}

// A WebhookConfig is that of webhook.Config in YAML.
type WebhookConfig struct {
	URL        string            `json:"url"`
	URLFile    string            `json:"urlFile"`
	Plain      bool              `json:"plain"`
	Format     string            `json:"format"` // json when empty
	SecretFile string            `json:"secretFile"`
	TokenFile  string            `json:"tokenFile"`
	Headers    map[string]string `json:"headers"`
	CAFile     string            `json:"caFile"`
	Timeout    string            `json:"timeout"`
}

// maxSinksFile bounds the file of --sinks.
const maxSinksFile = 1 << 20

// maxSinks bounds how many there can be: each reads the store by itself.
const maxSinks = 64

// ReadSinks reads the file of --sinks. Errors name the key.
func ReadSinks(path string) ([]SinkConfig, error) {
	b, err := wholefile.Read(path, maxSinksFile)
	if err != nil {
		return nil, err
	}
	sinks, err := parseSinks(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return sinks, nil
}

func parseSinks(b []byte) ([]SinkConfig, error) {
	var file struct {
		Sinks []SinkConfig `json:"sinks"`
	}
	if len(bytes.TrimSpace(b)) == 0 {
		return nil, errors.New("sinks: empty")
	}
	js, err := yaml.YAMLToJSONStrict(b)
	if err != nil {
		return nil, err
	}
	unknown, err := json.UnmarshalStrict(js, &file)
	if err := errors.Join(append(unknown, err)...); err != nil {
		return nil, err
	}
	if len(file.Sinks) > maxSinks {
		return nil, fmt.Errorf("sinks: %d, limit %d", len(file.Sinks), maxSinks)
	}
	names := make(map[string]bool)
	for i := range file.Sinks {
		s := &file.Sinks[i]
		if err := s.check(); err != nil {
			return nil, fmt.Errorf("sinks[%d].%w", i, err)
		}
		if names[s.Name] {
			return nil, fmt.Errorf("sinks[%d].name: %q is there twice", i, s.Name)
		}
		names[s.Name] = true
	}
	return file.Sinks, nil
}

var sinkName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// check turns the words into a filter. Errors begin with the key.
func (s *SinkConfig) check() error {
	if !sinkName.MatchString(s.Name) {
		return fmt.Errorf("name: %.64q, want lower-case letters, digits and hyphens, at most 63", s.Name)
	}
	if s.Name == "ndjson" || s.Name == "terminal" {
		return fmt.Errorf("name: %s is taken by the flag --%s", s.Name, s.Name)
	}
	if s.Webhook == nil {
		return errors.New("webhook: is missing: what kind of sink is it?")
	}
	if s.From != "" && s.From != "oldest" && s.From != "now" {
		return fmt.Errorf("from: %.32q, want oldest or now", s.From)
	}
	for i, k := range s.Kinds {
		kind, ok := store.ParseKind(k)
		if !ok {
			return fmt.Errorf("kinds[%d]: %.32q, want alert, amendment, coverage, loss, rejected or damaged", i, k)
		}
		s.filter.Kinds = append(s.filter.Kinds, kind)
	}
	if s.MinSeverity != "" {
		n, ok := pb.Severity_value["SEVERITY_"+strings.ToUpper(s.MinSeverity)]
		if !ok || n == 0 {
			return fmt.Errorf("minSeverity: %.32q, want Informational, Low, Medium, High or Critical", s.MinSeverity)
		}
		s.filter.MinSeverity = pb.Severity(n)
	}
	s.filter.Rules, s.filter.Namespaces, s.filter.DryRun = s.Rules, s.Namespaces, s.DryRun
	return s.filter.Check()
}

// open makes the destination.
func (s *SinkConfig) open(cluster string) (sink.Sink, error) {
	w := s.Webhook
	cfg := webhook.Config{Cluster: cluster, Format: webhook.Format(w.Format), URL: w.URL, URLFile: w.URLFile, Plain: w.Plain,
		SecretFile: w.SecretFile, TokenFile: w.TokenFile, Headers: w.Headers, CAFile: w.CAFile}
	if w.Format == "" {
		cfg.Format = webhook.JSON
	}
	if w.Timeout != "" {
		var err error
		if cfg.Timeout, err = time.ParseDuration(w.Timeout); err != nil {
			return nil, fmt.Errorf("webhook.timeout: %.32q, want a time like 10s", w.Timeout)
		}
	}
	out, err := webhook.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("webhook.%w", err)
	}
	return out, nil
}
