package matchtest

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/procession-dev/procession/internal/event"
)

// line is one program as it is started every day: parent, program, arguments,
// folder. A # becomes a number.
type line struct{ parent, exe, args, cwd string }

var everyday = []line{
	{"/usr/bin/containerd-shim-runc-v2 -namespace k8s.io -id 4f7c#a1b -address /run/containerd/containerd.sock", "/usr/bin/runc", "runc --root /run/containerd/runc/k8s.io --log /run/containerd/io.containerd.runtime.v2.task/k8s.io/4f7c#a1b/log.json --log-format json exec --process /tmp/runc-process# --detach --pid-file /run/containerd/io.containerd.runtime.v2.task/k8s.io/4f7c#a1b/#.pid 4f7c#a1b", "/run/containerd/io.containerd.runtime.v2.task/k8s.io/4f7c#a1b"},
	{"/usr/bin/kubelet --config=/var/lib/kubelet/config.yaml --container-runtime-endpoint=unix:///run/containerd/containerd.sock", "/usr/sbin/xtables-nft-multi", "iptables-restore -W 100000 --noflush --counters", "/"},
	{"/usr/bin/kube-proxy --config=/var/lib/kube-proxy/config.conf --hostname-override=node-#", "/usr/sbin/xtables-nft-multi", "iptables -w 5 -S KUBE-PROXY-CANARY -t mangle", "/"},
	{"nginx: master process nginx -g daemon off;", "/usr/sbin/nginx", "nginx -g daemon off;", "/"},
	{"runc init", "/usr/bin/dash", "/bin/sh -c wget -q -O /dev/null http://127.0.0.1:8080/healthz || exit 1", "/app"},
	{"/bin/sh -c wget -q -O /dev/null http://127.0.0.1:8080/healthz || exit 1", "/bin/busybox", "wget -q -O /dev/null http://127.0.0.1:8080/healthz", "/app"},
	{"runc init", "/usr/local/bin/grpc_health_probe", "/usr/local/bin/grpc_health_probe -addr=:909# -connect-timeout=250ms -rpc-timeout=100ms", "/"},
	{"/usr/lib/postgresql/16/bin/postgres -D /var/lib/postgresql/data", "/usr/bin/pg_isready", "pg_isready -U app -d shop -h 127.0.0.1 -p 5432", "/var/lib/postgresql"},
	{"/usr/sbin/cron -f", "/usr/bin/dash", "/bin/sh -c test -x /usr/sbin/anacron || { cd / && run-parts --report /etc/cron.daily; }", "/root"},
	{"/bin/sh -c test -x /usr/sbin/anacron || { cd / && run-parts --report /etc/cron.daily; }", "/usr/bin/run-parts", "run-parts --report /etc/cron.daily", "/"},
	{"/usr/bin/java -Xms512m -Xmx2g -jar /app/service.jar --spring.profiles.active=prod", "/usr/bin/uname", "uname -m", "/app"},
	{"/usr/lib/systemd/systemd --system --deserialize=#", "/usr/lib/systemd/systemd-tmpfiles", "systemd-tmpfiles --clean", "/"},
	{"/usr/bin/bash /opt/ci/run-step.sh build #", "/usr/local/go/bin/go", "go build -trimpath -ldflags=-s -w -X main.version=1.#.0 -o /workspace/bin/service ./cmd/service", "/workspace/src/github.com/example/service"},
	{"/usr/local/go/bin/go build -trimpath -o /workspace/bin/service ./cmd/service", "/usr/local/go/pkg/tool/linux_amd64/compile", "/usr/local/go/pkg/tool/linux_amd64/compile -o /tmp/go-build#/b#/_pkg_.a -trimpath /tmp/go-build#/b#=> -p github.com/example/service/internal/store -lang=go1.26 -complete -buildid abc# -goversion go1.26.8 -c=2 -nolocalimports -importcfg /tmp/go-build#/b#/importcfg -pack ./store.go ./sqlite.go ./queue.go", "/workspace/src/github.com/example/service"},
	{"/usr/bin/make -j4 all", "/usr/lib/gcc/x86_64-linux-gnu/12/cc1", "/usr/lib/gcc/x86_64-linux-gnu/12/cc1 -quiet -I include -imultiarch x86_64-linux-gnu src/main#.c -quiet -dumpdir build/ -dumpbase main#.c -mtune=generic -march=x86-64 -O2 -Wall -o /tmp/cc#.s", "/workspace/lib"},
	{"git fetch --prune --tags origin", "/usr/lib/git-core/git", "git rev-list --objects --stdin --not --all --quiet --alternate-refs", "/workspace/src"},
	{"/usr/bin/python3 /usr/bin/supervisord -c /etc/supervisor/supervisord.conf -n", "/usr/bin/python3.11", "python3 -m celery -A tasks worker --loglevel=info --concurrency=4", "/srv/app"},
	{"npm run build", "/usr/local/bin/node", "node /app/node_modules/.bin/webpack --mode production --config webpack.prod.js --progress", "/app"},
	{"/usr/sbin/sshd -D [listener] 0 of 10-100 startups", "/usr/bin/bash", "-bash", "/home/dev"},
	{"-bash", "/usr/bin/ls", "ls --color=auto -la", "/home/dev/project"},
	{"-bash", "/usr/bin/grep", "grep -rn TODO --include=*.go .", "/home/dev/project"},
	{"/opt/cni/bin/calico", "/usr/sbin/ip", "ip -o -4 addr show dev cali#a2", "/"},
	{"/usr/bin/node_exporter --collector.textfile.directory=/var/lib/node_exporter", "/usr/bin/cat", "cat /sys/class/hwmon/hwmon#/temp1_input", "/"},
	{"/usr/bin/dockerd-entrypoint.sh", "/usr/bin/tini", "tini -- /docker-entrypoint.sh redis-server /etc/redis/redis.conf", "/data"},
}

// Everyday makes n exec events as they happen on a node.
func Everyday(n int, seed uint64) []*event.Event {
	r := rand.New(rand.NewPCG(seed, 2))
	init := process(r, 1, "/usr/lib/systemd/systemd", "/usr/lib/systemd/systemd --system", "/")
	init.PPID, init.Workload = 0, &event.Workload{Place: event.PlaceHost}
	events := make([]*event.Event, n)
	for i := range events {
		l := everyday[r.IntN(len(everyday))]
		number := fmt.Sprint(r.IntN(9000) + 1000)
		fill := func(s string) string { return strings.ReplaceAll(s, "#", number) }
		w := workload(r)
		exe, _, _ := strings.Cut(fill(l.parent), " ")
		parent := process(r, int32(r.IntN(30000)+2), exe, fill(l.parent), "/")
		parent.Parent, parent.PPID, parent.Workload = init, 1, w
		p := process(r, int32(r.IntN(30000)+2), fill(l.exe), fill(l.args), fill(l.cwd))
		p.Parent, p.PPID, p.Workload = parent, parent.PID, w
		events[i] = &event.Event{Kind: event.Exec, Process: p, Time: time.Date(2026, 5, 1, 3, 0, i%60, 0, time.UTC)}
	}
	return events
}

func process(r *rand.Rand, pid int32, exe, args, cwd string) *event.Process {
	argv := strings.ReplaceAll(args, " ", "\x00") + "\x00"
	name := exe[strings.LastIndexByte(exe, '/')+1:]
	p := &event.Process{
		PID: pid, Start: uint64(pid) * 1e9, Exe: exe, File: exe, Name: name[:min(len(name), 15)], Cmdline: argv, CmdlineLen: uint32(len(argv)), Cwd: cwd,
		InnerPID: pid, SID: pid, LoginUID: 1<<32 - 1,
		CapEffective: r.Uint64N(1 << 41), Marks: event.MarkUpperKnown,
	}
	if r.IntN(2) == 0 {
		p.IDs = event.IDs{UID: 1000, EUID: 1000, SUID: 1000, GID: 1000, EGID: 1000}
	}
	for f := range p.Sources {
		p.Sources[f] = event.SourceRecord
	}
	return p
}

func workload(r *rand.Rand) *event.Workload {
	if r.IntN(3) == 0 {
		return &event.Workload{Place: event.PlaceHost}
	}
	n := r.IntN(20)
	return &event.Workload{
		Place: event.PlaceContainer, ContainerID: fmt.Sprintf("c%d", n), ContainerName: "app", Runtime: "containerd", Image: "registry.example/shop/app:1",
		PodUID: fmt.Sprintf("uid-%d", n), Pod: &event.Pod{UID: fmt.Sprintf("uid-%d", n), Namespace: "shop", Name: fmt.Sprintf("app-%d", n),
			Labels: map[string]string{"app": "web"}, ServiceAccount: "default", OwnerKind: "Deployment", OwnerName: "app"},
	}
}

// words are what the texts of random events and conditions are made of: what
// they have in common makes conditions true now and then.
var words = []string{"sh", "bash", "/bin/bash", "/usr/bin/python3.11", "-c", "-e", "curl", "http://10.0.0.1/x|sh", "/dev/tcp/", "nginx", "postgres",
	"id", "CAT", "cat", "Cat", "/etc/shadow", "", "a", "aa", "ab", "/tmp/", "/tmp/x", "É", "\xff", "\xff\xfe", "k", "\u212a", "s", "\u017f", "'", "\\",
	"/usr/sbin/nginx", "1", "-W 100000", "web", "shop", "app", "x\ny", "sshd", "systemd", "\uFFFD", "base64", "--exec", "stratum+tcp://pool"}

// Word is one of the texts that random events and conditions share.
func Word(r *rand.Rand) string { return words[r.IntN(len(words))] }

func phrase(r *rand.Rand, sep string) string {
	var b strings.Builder
	for i := range r.IntN(4) {
		if i > 0 {
			b.WriteString(sep)
		}
		b.WriteString(Word(r))
	}
	return b.String()
}

// Random makes an event of any kind about which any fact may be missing and
// any text may hold anything.
func Random(r *rand.Rand) *event.Event {
	kinds := event.AllKinds()
	ev := &event.Event{Kind: kinds[r.IntN(len(kinds))], Time: time.Unix(r.Int64N(1<<31), 0), Process: randomProcess(r, 3)}
	if r.IntN(2) == 0 {
		ev.Kind = event.Exec
	}
	if r.IntN(2) == 0 {
		ev.Target = randomProcess(r, 1)
	}
	ev.Synthetic = r.IntN(8) == 0
	ev.HasBefore, ev.Before = r.IntN(2) == 0, ids(r)
	ev.HasPrev, ev.PrevName = r.IntN(2) == 0, phrase(r, "")
	ev.Status = uint32(r.IntN(1 << 16))
	ev.Duration = time.Duration(r.IntN(3)) * time.Second
	if r.IntN(2) == 0 {
		ev.Record = &event.Record{Kind: ev.Kind, ID: uint32(r.IntN(3)), EID: uint32(r.IntN(3))}
	}
	return ev
}

func ids(r *rand.Rand) event.IDs {
	return event.IDs{UID: uint32(r.IntN(3)), EUID: uint32(r.IntN(2)), GID: uint32(r.IntN(3)), EGID: uint32(r.IntN(2)), SUID: uint32(r.IntN(2))}
}

func randomProcess(r *rand.Rand, ancestors int) *event.Process {
	p := &event.Process{
		PID: int32(r.IntN(4)), PPID: int32(r.IntN(2)), InnerPID: int32(r.IntN(3)), SID: int32(r.IntN(3)), TTY: int32(r.IntN(3)), LoginUID: uint32(r.IntN(2) * 1000),
		IDs: ids(r), CapEffective: r.Uint64(), Marks: event.Marks(r.Uint32()), NoNewPrivs: r.IntN(2) == 0,
		ExeFile: event.ExeFile{Mode: uint16(r.Uint32())}, Name: phrase(r, ""), Exe: phrase(r, "/"), File: phrase(r, "/"), Cwd: phrase(r, "/"), Cmdline: phrase(r, "\x00"),
	}
	if r.IntN(4) > 0 && p.Cmdline != "" {
		p.Cmdline += "\x00"
	}
	if r.IntN(20) == 0 {
		p.Cmdline += strings.Repeat(phrase(r, "\x00")+"x", 1+r.IntN(3000))
	}
	p.CmdlineLen = uint32(len(p.Cmdline) + r.IntN(2))
	sources := []event.Source{event.SourceNone, event.SourceRecord, event.SourceRecord, event.SourceProc, event.SourceLineage}
	whole := r.IntN(2) == 0
	for f := range p.Sources {
		if p.Sources[f] = event.SourceRecord; !whole {
			p.Sources[f] = sources[r.IntN(len(sources))]
		}
	}
	switch r.IntN(6) {
	case 0:
	case 1:
		p.Workload = &event.Workload{Place: event.PlaceUnknown, Reason: "process-gone"}
	case 2:
		p.Workload = &event.Workload{Place: event.PlaceContainer, ContainerID: "c1", PodUID: "uid-1"}
	default:
		p.Workload = workload(r)
	}
	if ancestors > 0 && r.IntN(4) > 0 {
		p.Parent = randomProcess(r, ancestors-1)
	}
	return p
}

// Hostile makes an event whose argument list is as long as it can be, of
// copies of text.
func Hostile(text string, size int) *event.Event {
	r := rand.New(rand.NewPCG(1, 1))
	p := process(r, 4242, "/usr/bin/wget", "wget", "/tmp")
	p.Cmdline = strings.Repeat(text, size/len(text)+1)[:size]
	p.CmdlineLen = uint32(size)
	p.Parent = process(r, 1, "/usr/bin/bash", "bash", "/")
	p.Parent.Cmdline, p.Parent.CmdlineLen, p.Parent.PPID = p.Cmdline, p.CmdlineLen, 0
	return &event.Event{Kind: event.Exec, Process: p, Time: time.Unix(1, 0)}
}

// Provoking makes an exec event out of literals of the conditions, so that
// some of them are true; now and then something is missing.
func Provoking(r *rand.Rand, conditions []string) *event.Event {
	src := conditions[r.IntN(len(conditions))]
	var texts []string
	for _, l := range literal.FindAllString(src, -1) {
		texts = append(texts, strings.NewReplacer(`\\`, `\`, `\'`, `'`).Replace(l[1:len(l)-1]))
	}
	ev := Everyday(1, r.Uint64())[0]
	some := func(sep string) string {
		var b strings.Builder
		for range r.IntN(4) {
			if len(texts) > 0 {
				b.WriteString(texts[r.IntN(len(texts))] + sep)
			}
		}
		return b.String()
	}
	p := ev.Process
	for _, t := range texts {
		if strings.HasPrefix(t, "/") && r.IntN(3) > 0 {
			p.Exe = "/usr/bin" + t
		}
	}
	p.Name = strings.TrimSuffix(some("\x00"), "\x00")
	p.Cmdline = "x\x00" + some("\x00") + strings.Join(texts, "\x00") + "\x00" + some("")
	p.CmdlineLen = uint32(len(p.Cmdline))
	if r.IntN(3) == 0 {
		p.Parent.Exe, p.Parent.Cmdline = some(""), some("\x00")
		p.Parent.CmdlineLen = uint32(len(p.Parent.Cmdline))
	}
	if r.IntN(3) == 0 {
		p.Sources[r.IntN(len(p.Sources))] = event.SourceNone
	}
	return ev
}
