package matchtest

import (
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strings"
)

func readFile(path string) ([]byte, error) { return os.ReadFile(path) }

// Lists and Variables are what the conditions of this package may name.
var Lists = map[string][]string{
	"shells":  {"sh", "bash", "dash", "ash", "zsh", "ksh", "csh", "tcsh", "fish"},
	"servers": {"nginx", "httpd", "apache2", "php-fpm", "node", "java", "gunicorn", "uwsgi", "mysqld", "postgres", "redis-server"},
	"folders": {"/tmp/", "/var/tmp/", "/dev/shm/", "/run/user/", "/mnt/"},
	"two":     {"id", "CAT"},
}

// Variables are compiled in this order.
var Variables = [][2]string{
	{"isShell", "process.name in lists.shells || process.exe.endsWithAny(['/sh', '/bash', '/dash'])"},
	{"byServer", "parent.name in lists.servers || grandparent.name in lists.servers"},
	{"line", "process.cmdline.lowerAscii()"},
	{"shellByServer", "variables.isShell && variables.byServer"},
	{"strange", "process.args.size() > 3 ? process.args[1] == '-c' : variables.isShell"},
	{"who", "process.uid"},
	{"both", "process.name + '/' + parent.name"},
}

// written are conditions the way detection engineers write them; the form of
// published rules with literals of their own.
var written = []string{
	`(process.exe.lowerAscii().endsWith('/crontab') || process.name == 'crontab') && process.cmdline.lowerAscii().contains(' -l')`,
	`(process.exe.lowerAscii().endsWith('/base64') || process.name == 'base64') && process.cmdline.lowerAscii().contains('-d')`,
	`(process.exe.endsWithAny(['/nc', '/ncat', '/netcat']) || process.name in ['nc', 'ncat', 'netcat']) && process.cmdline.containsAny([' -e ', ' -c ', '--exec '])`,
	`variables.isShell && process.cmdline.containsAny(['/dev/tcp/', '/dev/udp/'])`,
	`variables.shellByServer && !process.cmdline.endsWith('/healthz')`,
	`(process.exe.lowerAscii().endsWith('/curl') || process.name == 'curl') && (process.cmdline.lowerAscii().contains('169.254.169.254') || process.cmdline.lowerAscii().contains('metadata.google.internal'))`,
	`process.exe.startsWithAny(lists.folders) && !(process.exe.startsWith('/tmp/go-build') || parent.name == 'go')`,
	`(process.exe.lowerAscii().endsWith('/python') || process.exe.lowerAscii().contains('/python3.') || process.name == 'python') && (process.cmdline.lowerAscii().contains('http.server') || process.cmdline.lowerAscii().contains('simplehttpserver'))`,
	`(process.exe.lowerAscii().endsWith('/find') || process.name == 'find') && process.cmdline.lowerAscii().contains(' . ') && process.cmdline.lowerAscii().contains('-exec') && (process.cmdline.lowerAscii().contains('/bin/sh') || process.cmdline.lowerAscii().contains('/bin/bash'))`,
	`process.name in ['xmrig', 'minerd', 'cpuminer'] || variables.line.containsAny(['stratum+tcp://', 'stratum+ssl://', '--donate-level', '--coin='])`,
	`(process.exe.lowerAscii().endsWith('/systemctl') || process.name == 'systemctl') && variables.line.containsAny(['stop', 'disable', 'mask']) && variables.line.containsAny(['auditd', 'rsyslog', 'kubelet'])`,
	`process.exe.endsWith('/nsenter') && process.args.exists(a, a == '-t' || a.startsWith('--target')) && process.args.exists(a, a in ['1', '--target=1'])`,
	`ancestors.exists(a, a.name in ['sshd', 'dropbear']) && process.name == 'nmap'`,
	`process.uid != 0 && process.euid == 0 && !process.exe.startsWithAny(['/usr/bin/su', '/usr/lib/'])`,
	`(process.exe.lowerAscii().endsWith('/chmod') || process.name == 'chmod') && (variables.line.contains('/tmp/') || variables.line.contains('/etc/')) && !(parent.cmdline.lowerAscii().endsWith('/update-shells') || parent.cmdline.lowerAscii().contains('/var/lib/dpkg/info/') && parent.cmdline.lowerAscii().contains('.postinst configure') || process.cmdline.lowerAscii().startsWith('chmod 700 /tmp/apt-key-gpghome.'))`,
	`process.name in ['perl', 'ruby', 'php'] && process.args.exists(a, a in ['-e', '-r'] || a.matches('^-[a-z]*e$')) && process.cmdline.lowerAscii().containsAny(['socket', 'fsockopen', 'io.popen'])`,
	`variables.isShell && process.cmdline.matches('(curl|wget)[^;&]*\\|\\s*(sudo\\s+)?(sh|bash)')`,
	`process.cmdline.matches('(?i)(iptables|nft)\\s+(-F|--flush|flush)') && parent.name != 'kube-proxy'`,
	`(process.exe.lowerAscii().endsWith('/rm') || process.name == 'rm') && variables.line.contains('/var/log/') || variables.line.contains('histfile=/dev/null')`,
	`process.exeMemfd && !(process.name == 'runc' && parent.name.startsWith('containerd-shim'))`,
	`process.exeUpperLayer && container.image.startsWith('registry.example/shop/') && !process.isInit`,
	`(process.exe.lowerAscii().endsWith('/useradd') || process.name == 'useradd') && (variables.line.contains(' -o') || variables.line.contains(' -u 0'))`,
	`process.name == 'kubectl' && pod.serviceAccount != 'operator' && variables.line.containsAny(['exec ', 'cp ', 'port-forward'])`,
	`process.exe == '/usr/bin/gcore' || process.name == 'gcore' || process.exe.endsWith('/procdump') && process.cmdline.contains('-p')`,
	`process.loginuid == 1000 && process.tty > 0 && process.name == 'tcpdump'`,
	`process.cwd.startsWith('/dev/shm') && process.args.size() > 2 && process.name.endsWith('.sh')`,
	`process.name == 'bpftool' && 'CAP_SYS_ADMIN' in process.capabilities`,
	`process.script.endsWith('/entry.sh') && pod.labels[?'app'].orValue('') == 'web'`,
	`variables.line.containsAny(['id_rsa', '.aws/credentials', '.kube/config', '/etc/shadow', 'serviceaccount/token']) && process.name in ['cat', 'grep', 'find', 'tar', 'cp']`,
	`parent.exe.lowerAscii().endsWith('/dbus-daemon') && process.exe.lowerAscii().endsWith('/gnome-calc') && parent.cmdline.contains('--session')`,
}

// imported are conditions the way they come out of the import of published
// rules: programs, words of the command line, and what is left out, each of
// them as long as it is there, and nothing in common with other rules.
var imported = []struct{ tools, words, all, not string }{
	{"wget curl", "-O --output-document --post-file --upload-file -T", "", "/usr/share/"},
	{"tar zip gzip bzip2 xz 7z rar", "/etc/ /root/ /home/ .ssh .aws .kube", "", ""},
	{"id whoami groups hostname finger lsb_release users printenv", "", "", "/usr/lib/update-notifier /usr/bin/lesspipe"},
	{"cat less more head tail strings od xxd", "/etc/passwd /etc/shadow /etc/sudoers /etc/group .bash_history .pgpass .netrc", "", "/usr/sbin/unix_chkpwd"},
	{"iptables ip6tables nft ufw firewall-cmd", "-F --flush -X disable --delete-chain reset", "", "kube-proxy calico cilium"},
	{"nohup setsid disown screen tmux", "/tmp/ /var/tmp/ /dev/shm/ /.cache/", "&", ""},
	{"systemctl service chkconfig update-rc.d", "stop disable mask kill", "", "snapd logrotate"},
	{"", "eval( exec( base64_decode( gzinflate( str_rot13( assert( passthru( shell_exec( proc_open( pcntl_exec(", "php", ""},
	{"python python2 python3 perl ruby lua node", "socket.socket pty.spawn os.dup2 subprocess.call io.popen tcpsocket child_process net.connect", "-c", ""},
	{"insmod modprobe rmmod depmod kmod", "/tmp/ /dev/shm/ /home/ /root/", "", ""},
	{"docker ctr crictl nerdctl podman runc", "--privileged --pid=host --net=host --cap-add=all -v=/:/ --device=/dev/", "", ""},
	{"scp sftp rsync ftp tftp", "@ 10. 192.168. 172.16.", "", "/usr/bin/unattended-upgrade"},
	{"touch chattr setfattr setfacl chcon", "-r --reference +i -t -d", "", "/usr/bin/make"},
	{"useradd adduser usermod groupadd gpasswd passwd chpasswd", "sudo wheel root docker adm -o", "", "/usr/bin/dpkg"},
	{"", "xmrig minerd cpuminer ccminer ethminer phoenixminer nbminer t-rex lolminer gminer teamredminer nanominer srbminer", "", ""},
	{"", "pool.minexmr.com xmr.pool.minergate.com moneroocean.stream supportxmr.com nanopool.org 2miners.com ethermine.org f2pool.com antpool.com " +
		"nicehash.com hashvault.pro unmineable.com minergate.com crypto-pool.fr dwarfpool.com flypool.org herominers.com viabtc.com", "", ""},
	{"nmap masscan zmap rustscan hping3 fping arp-scan nbtscan netdiscover", "", "", ""},
	{"", "linpeas linenum lse.sh linux-exploit-suggester pspy unix-privesc-check beroot traitor sudo_killer dirtycow dirtypipe pwnkit overlayfs cve-2021- " +
		"cve-2022- cve-2023- cve-2024- exploit-db metasploit meterpreter cobaltstrike sliver mythic havoc brc4 covenant empire", "", ""},
	{"apt apt-get yum dnf apk zypper pacman pip pip3 npm gem cpan", "nmap netcat socat tor proxychains hydra john hashcat sqlmap metasploit impacket responder wireshark tcpdump gcc make", "install", "cloud-init"},
	{"history unset export", "histfile histsize histcontrol -c -w /dev/null", "", ""},
	{"rm shred wipe truncate unlink", "/var/log /var/spool .bash_history .zsh_history wtmp btmp lastlog utmp journal", "", "logrotate"},
	{"crontab at atd systemd-run", "/tmp/ /dev/shm/ curl wget base64 @reboot", "", ""},
	{"vim vi nano ed sed awk tee", "/etc/sudoers /etc/ld.so.preload /etc/profile .bashrc .profile authorized_keys /etc/pam.d /etc/cron", "", "ansible puppet chef-client salt-minion"},
	{"gdb strace ltrace perf bpftrace", "-p --pid attach ptrace", "", ""},
	{"dig host nslookup drill", "txt any axfr .onion .xyz .top", "", ""},
}

// single are the ones of written of which a set holds no copies: with other
// words they would be the same.
var single = []string{"process.euid == 0", "process.exeMemfd", "process.exeUpperLayer"}

func importedConditions() []string {
	var out []string
	for _, r := range imported {
		var all []string
		if r.tools != "" {
			var tools []string
			for _, t := range strings.Fields(r.tools) {
				tools = append(tools, term("process.exe", "endswith", "/"+t))
			}
			all = append(all, join(tools, "||"))
		}
		for _, part := range []struct{ words, op, not string }{{r.words, "||", ""}, {r.all, "&&", ""}, {r.not, "||", "!"}} {
			var words []string
			for _, w := range strings.Fields(part.words) {
				if part.not != "" {
					words = append(words, term("parent.cmdline", "contains", w))
					continue
				}
				words = append(words, term("process.cmdline", "contains", w))
			}
			if len(words) > 0 {
				all = append(all, part.not+"("+join(words, part.op)+")")
			}
		}
		out = append(out, strings.Join(all, " && "))
	}
	return out
}

// Written are the conditions themselves.
func Written() []string {
	out := importedConditions()
	for i, w := range written {
		out = append(out[:2*i%len(out)], append([]string{w}, out[2*i%len(out):]...)...) // mixed
	}
	return out
}

var literal = regexp.MustCompile(`'(?:[^'\\]|\\.)*'`)

// Grow makes n conditions of the base ones: those first, then copies of them in which
// seven of ten literals are others, of the same length and the same look.
func Grow(base []string, n int, seed uint64) []string {
	r := rand.New(rand.NewPCG(seed, 1))
	out := make([]string, 0, n)
	out = append(out, base[:min(n, len(base))]...)
	for i := 0; len(out) < n; i++ {
		src := base[i%len(base)]
		if !slices.ContainsFunc(single, func(s string) bool { return strings.Contains(src, s) }) {
			out = append(out, grown(r, src))
		}
	}
	return out
}

func grown(r *rand.Rand, src string) string {
	regexps := map[int]bool{}
	for _, at := range regexp.MustCompile(`matches\('`).FindAllStringIndex(src, -1) {
		regexps[at[1]-1] = true
	}
	var b strings.Builder
	from := 0
	for _, at := range literal.FindAllStringIndex(src, -1) {
		b.WriteString(src[from:at[0]])
		from = at[1]
		switch lit := src[at[0]:at[1]]; {
		case strings.HasSuffix(src[:at[0]], "?") || strings.Contains(lit, "CAP_") || strings.Contains(lit, `\`) && !regexps[at[0]]:
			b.WriteString(lit)
		case r.IntN(10) < 7:
			b.WriteString(otherWord(r, lit, regexps[at[0]]))
		default:
			b.WriteString(lit)
		}
	}
	return b.String() + src[from:]
}

// otherWord changes the letters of a literal, in a regular expression only
// those of its longer words.
func otherWord(r *rand.Rand, lit string, isRegexp bool) string {
	b := []byte(lit)
	for i := 0; i < len(b); {
		j := i
		for j < len(b) && 'a' <= b[j] && b[j] <= 'z' {
			j++
		}
		if !isRegexp || j-i > 3 && (i == 0 || b[i-1] != '\\') {
			for ; i < j; i++ {
				b[i] = byte('a' + r.IntN(26))
			}
		}
		i = j + 1
	}
	return string(b)
}
