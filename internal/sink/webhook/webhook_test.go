package webhook

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/sink"
	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/store/storetest"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var testTime = time.Date(2026, 3, 4, 14, 2, 7, 123456789, time.UTC)

func item(t testing.TB, seq uint64, kind store.Kind, it *pb.Item) store.Record {
	t.Helper()
	b, err := proto.Marshal(it)
	if err != nil {
		t.Fatal(err)
	}
	return store.Record{Cursor: int64(seq), Node: "node-12", Epoch: storetest.Epoch(0x9a), Seq: seq, To: seq, Kind: kind,
		Received: testTime.Add(time.Second), Committed: testTime.Add(2 * time.Second), Payload: b, CRC32C: store.Checksum(b), EventTime: testTime}
}

func shell() *pb.Alert {
	return &pb.Alert{
		Event: &pb.Event{Time: timestamppb.New(testTime), Kind: "Exec", Place: "container",
			Process: &pb.Process{Pid: 123, Ppid: proto.Int32(77), Exe: []byte("/usr/bin/dash"), Name: []byte("sh"), Cwd: []byte("/var/www"),
				Cmdline: []byte("sh\x00-c\x00id; echo 'done'\x00"), CmdlineLen: 22, Ids: &pb.IDs{Uid: 33, Euid: 33},
				Ancestors: []*pb.Process{{Pid: 77, Name: []byte("nginx"), Exe: []byte("/usr/sbin/nginx")}}},
			Container: &pb.Container{Id: "3f2a1b9c0d1e", Name: "web", Image: "registry:5000/nginx:1.29"},
			Pod:       &pb.Pod{Uid: "1fc8cbb1", Namespace: "default", Name: "web-7f"}},
		Severity: pb.Severity_SEVERITY_CRITICAL, Rule: "ClusterDetectionPolicy//shells/shell-with-network", Title: "Shell in a web server",
		Message: "nginx started a shell", Mitre: []*pb.Mitre{{Tactic: "TA0002", Technique: "T1059.004"}}, Tags: []string{"web"},
	}
}

// records are one of each kind, and one an attacker wrote.
func records(t testing.TB) []store.Record {
	evil := "<!channel> *x* `y` \x1b[2J\u202e|\"\\\n"
	return []store.Record{
		item(t, 1, store.Alert, &pb.Item{Item: &pb.Item_Alert{Alert: shell()}}),
		item(t, 2, store.Alert, &pb.Item{Item: &pb.Item_Alert{Alert: &pb.Alert{Severity: pb.Severity_SEVERITY_LOW, Rule: evil, Title: evil, Message: evil, Tags: []string{evil},
			Event: &pb.Event{Kind: evil, Pod: &pb.Pod{Namespace: evil, Name: evil}, Container: &pb.Container{Name: evil, Image: evil},
				Process: &pb.Process{Pid: 5, Name: []byte(evil + "\xff"), Exe: []byte(evil), Cmdline: []byte("a b\x00\x00" + evil + "\xff\x00")}}}}}),
		item(t, 3, store.Alert, &pb.Item{Item: &pb.Item_Alert{Alert: &pb.Alert{Event: &pb.Event{}}}}),
		item(t, 4, store.Amendment, &pb.Item{Item: &pb.Item_Amendment{Amendment: &pb.Amendment{Seq: 1, Pod: &pb.Pod{Namespace: "default", Name: "web-7f"}}}}),
		item(t, 5, store.Coverage, &pb.Item{Item: &pb.Item_Coverage{Coverage: &pb.Coverage{Capture: "recorder", Events: map[string]uint64{"Exec": 7}}}}),
		{Node: "node-12", Epoch: storetest.Epoch(0x9a), Seq: 6, To: 9, Kind: store.Loss, LossReason: pb.LossReason_LOSS_REASON_SPOOL_FULL, Received: testTime},
		{Node: "node-12", Epoch: storetest.Epoch(0x9a), Seq: 10, To: 10, Kind: store.Rejected, Reason: "crc32c: wrong", Payload: []byte{0xff}, Received: testTime},
	}
}

// The body of each kind of record in each format is in testdata.
func TestFormats(t *testing.T) {
	for _, name := range Formats() {
		var got bytes.Buffer
		for _, r := range records(t) {
			js := Format(name).Append(nil, "prod", &r)
			if !json.Valid(js) {
				t.Fatalf("%s: not JSON: %s", name, js)
			}
			for _, c := range js {
				if c < ' ' {
					t.Errorf("%s: control character %#x in %s", name, c, js)
				}
			}
			if err := json.Indent(&got, js, "", " "); err != nil {
				t.Fatal(err)
			}
			got.WriteByte('\n')
			if !strings.Contains(string(js), strings.ReplaceAll(r.ID("prod"), "/", `/`)) {
				t.Errorf("%s: the id %s is not in %s", name, r.ID("prod"), js)
			}
		}
		path := filepath.Join("testdata", name+".golden")
		if *update {
			if err := os.WriteFile(path, got.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got.String(), "\n")); d != "" {
			t.Errorf("%s (-want +got):\n%s", path, d)
		}
	}
}

// What falcosidekick needs to take an alert, and to take it for what it is.
func TestFalcoHasWhatSidekickNeeds(t *testing.T) {
	for _, r := range records(t) {
		var got struct {
			Output, Priority, Rule string
			Time                   time.Time
			Fields                 map[string]any `json:"output_fields"`
		}
		if err := json.Unmarshal(Falco.Append(nil, "prod", &r), &got); err != nil {
			t.Fatal(err)
		}
		if got.Output == "" || got.Rule == "" && r.Seq != 3 || got.Time.IsZero() || len(got.Fields) == 0 {
			t.Errorf("record %d: %+v", r.Seq, got)
		}
		if !strings.Contains("Critical Error Warning Notice Informational", got.Priority) || got.Priority == "" {
			t.Errorf("record %d: priority %q", r.Seq, got.Priority)
		}
		for k, v := range got.Fields {
			if _, ok := v.(string); strings.HasPrefix(k, "k8s.") && !ok {
				t.Errorf("record %d: %s is %T, want a string", r.Seq, k, v)
			}
		}
	}
}

type request struct {
	key, sig, auth, extra string
	body                  []byte
}

// receiver is a real HTTPS server that does as it is told.
func receiver(t *testing.T, answer func(n int, w http.ResponseWriter, r *http.Request)) (url, ca string, got func() []request) {
	t.Helper()
	ch := make(chan request, 1000)
	n := 0
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		ch <- request{r.Header.Get("Idempotency-Key"), r.Header.Get(signatureHeader), r.Header.Get("Authorization"), r.Header.Get("X-Team"), b}
		n++
		answer(n, w, r)
	}))
	t.Cleanup(srv.Close)
	ca = filepath.Join(t.TempDir(), "ca.pem")
	writeFile(t, ca, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})))
	return srv.URL + "/hook?token=hidden", ca, func() (all []request) {
		for len(ch) > 0 {
			all = append(all, <-ch)
		}
		return all
	}
}

func TestDeliver(t *testing.T) {
	url, ca, got := receiver(t, func(_ int, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusAccepted) })
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "url"), url+"\n")
	writeFile(t, filepath.Join(dir, "secret"), "s3cret\n")
	writeFile(t, filepath.Join(dir, "token"), "t0ken\n")
	w := must(t, Config{Cluster: "prod", Format: JSON, URLFile: filepath.Join(dir, "url"), CAFile: ca,
		SecretFile: filepath.Join(dir, "secret"), TokenFile: filepath.Join(dir, "token"), Headers: map[string]string{"X-Team": "soc"}})
	recs := records(t)
	if err := w.Deliver(t.Context(), recs); err != nil {
		t.Fatal(err)
	}
	reqs := got()
	if len(reqs) != len(recs) {
		t.Fatalf("%d requests, want %d", len(reqs), len(recs))
	}
	for i, r := range reqs {
		if r.key != recs[i].ID("prod") || r.auth != "Bearer t0ken" || r.extra != "soc" {
			t.Errorf("request %d: %+v", i, r)
		}
		var at int64
		if _, err := fmt.Sscanf(r.sig, "t=%d,", &at); err != nil || r.sig != Sign([]byte("s3cret"), time.Unix(at, 0), r.body) {
			t.Errorf("request %d: signature %q does not verify", i, r.sig)
		}
		if r.sig == Sign([]byte("other"), time.Unix(at, 0), r.body) {
			t.Error("another key makes the same signature")
		}
	}
}

// What each answer means. The error never has the address in it.
func TestAnswers(t *testing.T) {
	hang := make(chan struct{})
	t.Cleanup(func() { close(hang) })
	for _, tt := range []struct {
		name   string
		answer func(n int, w http.ResponseWriter, r *http.Request)
		want   string
		retry  time.Duration
	}{
		{"500", func(_ int, w http.ResponseWriter, _ *http.Request) { http.Error(w, "oops\x1b", 500) }, `status 500: "oops`, 0},
		{"401", func(_ int, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401) }, "status 401", 0},
		{"429 with seconds", func(_ int, w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "17")
			w.WriteHeader(429)
		}, "status 429", 17 * time.Second},
		{"503 with nonsense", func(_ int, w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "-5")
			w.WriteHeader(503)
		}, "status 503", 0},
		{"redirect", func(_ int, w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
		}, "status 307", 0},
		{"200, then reset", func(_ int, w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			w.WriteHeader(200)
			w.Write([]byte("ok"))
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, "broke off", 0},
		{"for ever", func(_ int, w http.ResponseWriter, r *http.Request) {
			select {
			case <-hang:
			case <-r.Context().Done():
			}
		}, "exceeded", 0},
		{"endless", func(_ int, w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(500)
			for range 1000 {
				if _, err := w.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		}, "status 500", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			url, ca, got := receiver(t, tt.answer)
			w := must(t, Config{Format: JSON, URL: url, CAFile: ca, Timeout: time.Second})
			recs := records(t)
			var de *sink.DeliveryError
			if err := w.Deliver(t.Context(), recs); !errors.As(err, &de) {
				t.Fatalf("error %v, want a DeliveryError", err)
			}
			if de.Done != 0 || de.Refused || de.RetryAfter != tt.retry || !strings.Contains(de.Error(), tt.want) || strings.Contains(de.Error(), "hidden") {
				t.Errorf("%+v (%v), want nothing done, %q, and to wait %v", de, de, tt.want, tt.retry)
			}
			if n := len(got()); n != 1 {
				t.Errorf("%d requests after a failure, want 1", n)
			}
		})
	}
}

// A record that is no good is refused after some tries, those behind it are not.
func TestRefused(t *testing.T) {
	recs := records(t)
	bad := recs[2].ID("")
	url, ca, _ := receiver(t, func(_ int, w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Idempotency-Key") == bad {
			w.WriteHeader(http.StatusUnprocessableEntity)
		}
	})
	w := must(t, Config{Format: JSON, URL: url, CAFile: ca})
	left := recs
	for try := 1; ; try++ {
		var de *sink.DeliveryError
		if err := w.Deliver(t.Context(), left); !errors.As(err, &de) {
			t.Fatalf("try %d: error %v", try, err)
		}
		left = left[de.Done:]
		if left[0].ID("") != bad {
			t.Fatalf("try %d: stopped at %s", try, left[0].ID(""))
		}
		if de.Refused {
			if try != maxRefusals {
				t.Errorf("refused after %d tries, want %d", try, maxRefusals)
			}
			break
		}
	}
	if err := w.Deliver(t.Context(), left[1:]); err != nil {
		t.Errorf("what is behind it: %v", err)
	}
}

func TestDeliverStops(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	url, ca, _ := receiver(t, func(_ int, w http.ResponseWriter, r *http.Request) { cancel(); <-r.Context().Done() })
	w := must(t, Config{Format: JSON, URL: url, CAFile: ca, Timeout: time.Minute})
	if err := w.Deliver(ctx, records(t)); err == nil || ctx.Err() == nil {
		t.Errorf("error %v, want one", err)
	}
}

// Errors name the field, and keep secrets.
func TestConfig(t *testing.T) {
	dir := t.TempDir()
	empty, plain := filepath.Join(dir, "empty"), filepath.Join(dir, "plain")
	writeFile(t, empty, "\n")
	writeFile(t, plain, "http://hidden.example/x")
	ok := Config{Format: JSON, URL: "https://hidden.example/x"}
	for _, tt := range []struct {
		want   string
		change func(*Config)
	}{
		{"format: ", func(c *Config) { c.Format = "xml" }},
		{"url: exactly one", func(c *Config) { c.URL = "" }},
		{"url: exactly one", func(c *Config) { c.URLFile = plain }},
		{"url: http is not encrypted", func(c *Config) { c.URL = "http://hidden.example" }},
		{"url: http is not encrypted", func(c *Config) { c.URL, c.URLFile = "", plain }},
		{"url: scheme", func(c *Config) { c.URL = "file:///hidden" }},
		{"url: not a URL", func(c *Config) { c.URL = "https://hidden\x7f" }},
		{"url: no host", func(c *Config) { c.URL = "https:///hidden" }},
		{"urlFile: ", func(c *Config) { c.URL, c.URLFile = "", filepath.Join(dir, "none") }},
		{"secretFile: ", func(c *Config) { c.SecretFile = empty }},
		{"tokenFile: ", func(c *Config) { c.TokenFile = filepath.Join(dir, "none") }},
		{"caFile: ", func(c *Config) { c.CAFile = plain }},
		{"timeout: ", func(c *Config) { c.Timeout = time.Millisecond }},
		{"headers: ", func(c *Config) { c.Headers = map[string]string{"X-A": "b\r\nX-C: d"} }},
		{"headers: Idempotency-Key", func(c *Config) { c.Headers = map[string]string{"idempotency-key": "x"} }},
	} {
		c := ok
		tt.change(&c)
		_, err := New(c)
		if err == nil || !strings.HasPrefix(err.Error(), tt.want) || strings.Contains(err.Error(), "hidden") {
			t.Errorf("%v, want %q", err, tt.want)
		}
	}
	if _, err := New(ok); err != nil {
		t.Error(err)
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for v, want := range map[string]time.Duration{
		"": 0, "0": 0, "120": 2 * time.Minute, "x": 0, "-1": 0, "99999999999999999999": 0,
		now.Add(time.Minute).Format(http.TimeFormat): time.Minute, now.Add(-time.Hour).Format(http.TimeFormat): 0,
	} {
		if got := retryAfter(v, now); got != want {
			t.Errorf("%q: %v, want %v", v, got, want)
		}
	}
}

// FuzzFormats: whatever an alert has in it, each format is one JSON value
// without a control character.
func FuzzFormats(f *testing.F) {
	for _, r := range records(f) {
		f.Add(r.Payload, uint8(r.Kind), r.Reason)
	}
	f.Fuzz(func(t *testing.T, payload []byte, kind uint8, reason string) {
		r := store.Record{Node: "n", Seq: 1, To: 1, Kind: store.Kind(kind%7 + 1), Payload: payload, Reason: reason, Received: testTime}
		for _, name := range Formats() {
			js := Format(name).Append(nil, "c", &r)
			if !json.Valid(js) || bytes.ContainsFunc(js, func(c rune) bool { return c < ' ' }) {
				t.Fatalf("%s: %q", name, js)
			}
		}
	})
}

func must(t *testing.T, c Config) *Webhook {
	t.Helper()
	w, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
