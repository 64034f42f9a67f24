//go:build e2e

package e2e

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/procession-dev/procession/test/e2e/cluster"
)

const crowd = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: crowd, namespace: e2e-shop}
spec:
  replicas: 30
  selector: {matchLabels: {app: crowd}}
  template:
    metadata: {labels: {app: crowd}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: main, image: "` + attackedImage + `", imagePullPolicy: Never, command: [sleep, "1000000"]}]
`

// An expense is what the agent has used at one moment.
type expense struct {
	at           time.Time
	user, system float64 // s of processor time
	switches     float64 // times that a thread of it went to sleep
	events       float64 // received from the kernel
	lists        float64 // of pods, from the kubelet
}

// measure publishes what an agent costs beside 30 pods that do nothing:
// PROCESSION_E2E_MEASURE says for how long it looks (20s). What it asks of the
// API server is a promise; the rest depends on what else the machine does.
func measure(t *testing.T, p *product) {
	window := 20 * time.Second
	if v := os.Getenv("PROCESSION_E2E_MEASURE"); v != "" {
		d, err := time.ParseDuration(v)
		if err != nil {
			t.Fatal(err)
		}
		window = d
	}
	c := p.c
	c.Apply(t, crowd)
	c.WaitReady(t, "e2e-shop", "app=crowd", 30)
	pid, err := c.ContainerPID(t.Context(), p.pod(t, p.agents), "agent")
	if err != nil {
		t.Fatal(err)
	}
	before := p.spent(t, pid)
	select {
	case <-time.After(window): // what is measured is time
	case <-t.Context().Done():
		t.Fatal("interrupted")
	}
	after := p.spent(t, pid)
	took := after.at.Sub(before.at)
	s := took.Seconds()
	memory := resident(t, pid)
	total := 0
	for _, kib := range memory {
		total += kib
	}
	all, err := c.Requests(before.at)
	if err != nil {
		t.Fatal(err)
	}

	var b strings.Builder
	row := func(what, format string, a ...any) { fmt.Fprintf(&b, "| %s | %s |\n", what, fmt.Sprintf(format, a...)) }
	row("an agent beside 30 pods that do nothing", "over %v", took.Round(time.Second))
	row("---", "---")
	row("processor", "%.2f %% of a core: %.2f user, %.2f system", 100*(after.user+after.system-before.user-before.system)/s, 100*(after.user-before.user)/s, 100*(after.system-before.system)/s)
	row("for", "%.1f events/s of the whole machine; its threads went to sleep %.0f times/s", (after.events-before.events)/s, (after.switches-before.switches)/s)
	row("resident", "%.1f MiB", float64(total)/1024)
	for _, part := range memoryParts {
		row("of it "+part, "%.1f MiB", float64(memory[part])/1024)
	}
	row("resident at its peak, the start included", "%.1f MiB", float64(peak(t, pid))/1024)
	row("lists of pods from the kubelet", "%.0f", after.lists-before.lists)
	asked := requestsByPath(all, "system:serviceaccount:"+p.namespace+":procession-agent", "")
	row("requests of the agent to the API server", "%s", orNone(asked))
	row("of the kubelet, to know who asks it for pods", "%s", orNone(requestsByPath(all, "system:node:"+c.Node, "create")))
	row("of the collector", "%s", orNone(requestsByPath(all, "system:serviceaccount:"+p.namespace+":procession-collector", "")))
	t.Logf("\n%s", b.String())

	// Twice what is promised: other tests may run on this machine.
	if total > 128<<10 {
		t.Errorf("resident memory is %d KiB", total)
	}
	for what, n := range asked {
		switch most := 1 + int(took/watchLasts); {
		case what != "watch /apis/procession.dev/v1alpha1/clusterdetectionpolicies" && what != "watch /apis/procession.dev/v1alpha1/detectionpolicies":
			t.Errorf("%d times in %v the agent asked the API server to %s: it promises two watches and nothing else", n, took, what)
		case n > most:
			t.Errorf("%d times in %v the agent began to %s, want at most %d", n, took, what, most)
		}
	}
}

// watchLasts is how long client-go lets a watch last at least; at most twice as
// long. Then it is begun anew, without a list.
const watchLasts = 5 * time.Minute

// requestsByPath counts a user's requests by verb and path, of one verb or all.
func requestsByPath(all []cluster.Request, user, verb string) map[string]int {
	n := map[string]int{}
	for _, q := range all {
		if path, _, _ := strings.Cut(q.URI, "?"); q.User == user && (verb == "" || q.Verb == verb) {
			n[q.Verb+" "+path]++
		}
	}
	// A node makes events and tokens for its pods: nothing of ours.
	for what := range n {
		if verb != "" && !strings.Contains(what, "reviews") {
			delete(n, what)
		}
	}
	return n
}

func orNone(n map[string]int) string {
	var s []string
	for what, times := range n {
		s = append(s, fmt.Sprintf("%d %s", times, what))
	}
	if len(s) == 0 {
		return "none"
	}
	slices.Sort(s)
	return strings.Join(s, ", ")
}

// spent is what the agent's process pid has used so far.
func (p *product) spent(t *testing.T, pid int) expense {
	t.Helper()
	e := expense{at: time.Now()}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	e.user, e.system = number(t, f[11])/100, number(t, f[12])/100 // USER_HZ is 100
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range threads {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // the thread has ended
		}
		for line := range strings.Lines(string(b)) {
			if n, ok := strings.CutPrefix(line, "voluntary_ctxt_switches:"); ok {
				e.switches += number(t, n)
			}
		}
	}
	e.events = counter(t, p.metrics, "procession_agent_events_received_total", "")
	e.lists = counter(t, p.metrics, "procession_agent_pods_lists_total", "")
	return e
}

func number(t *testing.T, s string) float64 {
	t.Helper()
	n, err := strconv.ParseFloat(strings.TrimSpace(s), 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// peak is a process's greatest resident memory since its start, in KiB.
func peak(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if w := strings.Fields(line); w[0] == "VmHWM:" {
			return int(number(t, w[1]))
		}
	}
	t.Fatalf("no VmHWM of pid %d", pid)
	return 0
}

// memoryParts are what a process's resident memory is made of.
var memoryParts = []string{"heap, stacks and the runtime's own", "the program, mapped from its file", "the kernel's ring", "other"}

// resident is a process's resident memory by part, in KiB.
func resident(t *testing.T, pid int) map[string]int {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sum := map[string]int{}
	var name string
	sc := bufio.NewScanner(f)
	for rss := 0; sc.Scan(); {
		switch w := strings.Fields(sc.Text()); {
		case strings.Contains(w[0], "-"):
			name = strings.Join(w[5:], " ")
		case w[0] == "Rss:":
			rss = int(number(t, w[1]))
		case w[0] == "Anonymous:":
			own := int(number(t, w[1]))
			sum[memoryParts[0]] += own
			switch {
			case strings.HasPrefix(name, "anon_inode:"):
				sum[memoryParts[2]] += rss - own
			case strings.HasPrefix(name, "/"):
				sum[memoryParts[1]] += rss - own
			default:
				sum[memoryParts[3]] += rss - own
			}
		}
	}
	if err := sc.Err(); err != nil {
		t.Fatal(err)
	}
	return sum
}
