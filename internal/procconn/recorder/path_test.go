//go:build linux

package recorder

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/event"
)

// marksOfPath are the marks that the path cases speak about.
const marksOfPath = event.MarkMemfd | event.MarkDeleted | event.MarkDetached | event.MarkOutsideRoot | event.MarkForeign |
	event.MarkExeCut | event.MarkCwdCut | event.MarkUpper | event.MarkUpperKnown

// A pathCase makes a command that runs a program which waits for its input, in
// a directory of its own on a file system of its own.
type pathCase struct {
	name  string
	make  func(t *testing.T, prog, dir string) *exec.Cmd
	exe   func(prog, dir string) string // what readlink must say; nil: whatever it says
	marks event.Marks
	execs int    // how many execs come before the one that counts, by the program itself
	go1   bool   // the program waits for one byte first
	file  string // name handed to execve, if it is worth a look
}

var pathCases = []pathCase{
	{name: "plain", make: plain, exe: inDir("prog"), file: "prog"},
	{name: "symlink", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		must(t, os.Symlink("prog", dir+"/link"))
		return exec.Command(dir+"/link", "w")
	}, exe: inDir("prog"), file: "link"},
	{name: "hard-link", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		must(t, os.Link(dir+"/prog", dir+"/hard"))
		return exec.Command(dir+"/hard", "w")
	}, exe: inDir("hard")},
	{name: "renamed between open and exec", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		fd := openFile(t, dir+"/prog")
		must(t, os.Rename(dir+"/prog", dir+"/other"))
		return byFD(fd)
	}, exe: inDir("other")},
	{name: "script", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		must(t, os.WriteFile(dir+"/script", []byte("#!"+dir+"/prog w\n"), 0o755))
		return exec.Command(dir + "/script")
	}, exe: inDir("prog"), file: "script"},
	{name: "odd names", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		must(t, os.Rename(dir+"/prog", dir+"/a\nb (deleted)"))
		return exec.Command(dir+"/a\nb (deleted)", "w")
	}, exe: inDir("a\nb (deleted)")},
	{name: "bind mount of a directory", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		must(t, os.Mkdir(dir+"/to", 0o755))
		must(t, unix.Mount(dir, dir+"/to", "", unix.MS_BIND, ""))
		return exec.Command(dir+"/to/prog", "w")
	}, exe: inDir("to/prog")},
	{name: "bind mount of a file", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		must(t, os.WriteFile(dir+"/on", nil, 0o755))
		must(t, unix.Mount(dir+"/prog", dir+"/on", "", unix.MS_BIND, ""))
		return exec.Command(dir+"/on", "w")
	}, exe: inDir("on")},
	{name: "tmpfs in tmpfs", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		must(t, os.Mkdir(dir+"/in", 0o755))
		must(t, unix.Mount("none", dir+"/in", "tmpfs", 0, ""))
		copyFile(t, dir+"/prog", dir+"/in/prog")
		return exec.Command(dir+"/in/prog", "w")
	}, exe: inDir("in/prog")},
	{name: "moved out of a bind mount", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		must(t, os.MkdirAll(dir+"/a/b/x", 0o755))
		must(t, os.Mkdir(dir+"/m", 0o755))
		copyFile(t, prog, dir+"/a/b/x/prog")
		must(t, unix.Mount(dir+"/a/b", dir+"/m", "", unix.MS_BIND, ""))
		cmd := exec.Command(prog, "r", "x", "./prog", "./prog", "w")
		cmd.Dir = dir + "/m/x"
		return cmd
	}, execs: 1, go1: true, exe: text("/"), marks: event.MarkOutsideRoot},
	{name: "memfd", make: func(t *testing.T, prog, dir string) *exec.Cmd { return memfd(t, prog, "evil") },
		exe: text("/memfd:evil (deleted)"), marks: event.MarkMemfd},
	{name: "memfd with slashes", make: func(t *testing.T, prog, dir string) *exec.Cmd { return memfd(t, prog, "a/b/") },
		exe: text("/memfd:a/b/ (deleted)"), marks: event.MarkMemfd},
	{name: "memfd without name", make: func(t *testing.T, prog, dir string) *exec.Cmd { return memfd(t, prog, "") },
		exe: text("/memfd: (deleted)"), marks: event.MarkMemfd},
	{name: "deleted before exec", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		fd := openFile(t, dir+"/prog")
		must(t, os.Remove(dir+"/prog"))
		return byFD(fd)
	}, exe: inDir("prog (deleted)"), marks: event.MarkDeleted},
	{name: "O_TMPFILE", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o755)
		must(t, err)
		return byFD(filled(t, fd, prog))
	}, marks: event.MarkDeleted},
	{name: "detached mount", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		must(t, os.Mkdir(dir+"/in", 0o755))
		must(t, unix.Mount("none", dir+"/in", "tmpfs", 0, ""))
		copyFile(t, dir+"/prog", dir+"/in/prog")
		fd := openFile(t, dir+"/in/prog")
		must(t, unix.Unmount(dir+"/in", unix.MNT_DETACH))
		return byFD(fd)
	}, exe: text("/prog"), marks: event.MarkDetached | event.MarkOutsideRoot},
	{name: "clone of a mount", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		// As runc does with itself.
		fd, err := unix.OpenTree(unix.AT_FDCWD, dir+"/prog", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		must(t, err)
		return byFD(closing(t, fd))
	}, exe: text("/"), marks: event.MarkDetached | event.MarkOutsideRoot},
	{name: "opened by handle", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, dir+"/prog", 0)
		must(t, err)
		at := openFile(t, dir)
		fd, err := unix.OpenByHandleAt(at, h, unix.O_RDONLY|unix.O_CLOEXEC)
		must(t, err)
		return byFD(closing(t, fd))
	}, exe: inDir("prog")},
	{name: "chroot", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		cmd := exec.Command("/prog", "w")
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: dir}
		return cmd
	}, exe: inDir("prog"), file: "prog"},
	{name: "from outside the chroot", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		must(t, os.Mkdir(dir+"/root", 0o755))
		copyFile(t, dir+"/prog", dir+"/root/prog")
		cmd := exec.Command("/prog", "f", "3", "prog", "w")
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: dir + "/root"}
		cmd.ExtraFiles = []*os.File{openOSFile(t, dir+"/prog")}
		return cmd
	}, exe: inDir("prog"), execs: 1, marks: event.MarkOutsideRoot},
	{name: "mount namespace of its own", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		cmd := plain(t, prog, dir)
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
		return cmd
	}, exe: inDir("prog")},
	{name: "from another mount namespace", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		cmd := exec.Command(dir+"/prog", "f", "3", "prog", "w")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
		cmd.ExtraFiles = []*os.File{openOSFile(t, dir+"/prog")}
		return cmd
	}, exe: inDir("prog"), execs: 1, marks: event.MarkForeign | event.MarkOutsideRoot},
	{name: "overlay lower", make: overlay("low"), exe: inDir("m/low"), marks: event.MarkUpperKnown},
	{name: "overlay upper", make: overlay("up"), exe: inDir("m/up"), marks: event.MarkUpperKnown | event.MarkUpper},
	{name: "overlay copied up", make: overlay("copied"), exe: inDir("m/copied"), marks: event.MarkUpperKnown | event.MarkUpper},
	{name: "long path", make: deep(12, 250), marks: 0},
	{name: "deep path", make: deep(40, 1), marks: 0},
	{name: "too deep path", make: deep(80, 1), marks: event.MarkExeCut | event.MarkCwdCut},
	{name: "working directory in the root", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		cmd := plain(t, prog, dir)
		cmd.Dir = "/"
		return cmd
	}, exe: inDir("prog")},
	{name: "working directory in a mount's root", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		cmd := plain(t, prog, dir)
		cmd.Dir = dir
		return cmd
	}, exe: inDir("prog")},
	{name: "deleted working directory", make: func(t *testing.T, prog, dir string) *exec.Cmd {
		must(t, os.Mkdir(dir+"/gone", 0o755))
		cmd := exec.Command(dir+"/prog", "r", "x", dir+"/prog", dir+"/prog", "w")
		cmd.Dir = dir + "/gone"
		return cmd
	}, execs: 1, go1: true, exe: inDir("prog")},
}

// beforeByte is what a case does after its program has started and before it
// goes on.
var beforeByte = map[string]func(t *testing.T, dir string){
	"moved out of a bind mount": func(t *testing.T, dir string) { must(t, os.Rename(dir+"/a/b/x", dir+"/a/x")) },
	"deleted working directory": func(t *testing.T, dir string) { must(t, os.Remove(dir+"/gone")) },
}

// The path of the executable is the one that readlink of /proc/PID/exe shows,
// and the working directory that of /proc/PID/cwd.
func TestPath(t *testing.T) {
	each(t, Config{Cwd: true}, func(t *testing.T, r *Recorder) {
		prog := buildProg(t)
		l := newLog()
		listen(t, r, l.add)
		for _, c := range pathCases {
			t.Run(c.name, func(t *testing.T) { inMountNS(t, func(dir string) { testPath(t, r, l, c, prog, dir) }) })
		}
	})
}

func testPath(t *testing.T, r *Recorder, l *log, c pathCase, prog, dir string) {
	copyFile(t, prog, dir+"/prog")
	cmd := c.make(t, prog, dir)
	p := start(t, cmd)
	pid := p.Process.Pid
	if c.go1 {
		l.of(t, event.Exec, pid)
		beforeByte[c.name](t, dir)
		p.byte(t)
	}
	if c.execs > 0 {
		// Some kernels refuse to execute a file outside the root (TOMOYO).
		x := l.find(t, "the next exec, or exit", func(r *event.Record) bool {
			return r.TGID == int32(pid) && (r.Kind == event.Exec && !bytes.Equal(r.Cmdline, argv(cmd.Args...)) || r.Kind == event.Exit)
		})
		if x.Kind == event.Exit && event.ExitCode(x.Status) == 127 {
			t.Skip("this kernel refuses the exec")
		}
	}
	execs := 0
	e := l.find(t, "the exec", func(r *event.Record) bool {
		if r.Kind == event.Exec && r.TGID == int32(pid) {
			execs++
		}
		return execs > c.execs
	})
	link := func(name string) string {
		s, err := os.Readlink(fmt.Sprintf("/proc/%d/%s", pid, name))
		must(t, err)
		return s
	}
	exe, cwd := link("exe"), link("cwd")
	if c.exe != nil && exe != c.exe(prog, dir) {
		t.Errorf("readlink says %q, want %q: the case is not what it should be", exe, c.exe(prog, dir))
	}
	marks := c.marks
	if !r.Features().Overlay {
		marks &^= event.MarkUpper | event.MarkUpperKnown
	}
	if e.Marks&marksOfPath != marks {
		t.Errorf("marks %010b, want %010b", e.Marks&marksOfPath, marks)
	}
	if marks.Has(event.MarkExeCut) {
		// The end of the path is there.
		if !strings.HasSuffix(exe, string(e.Exe)) || !strings.HasSuffix(cwd, string(e.Cwd)) || len(e.Exe) < pathDepth {
			t.Errorf("exe %q, cwd %q; want the ends of %q, %q", e.Exe, e.Cwd, exe, cwd)
		}
	} else if string(e.Exe) != exe || string(e.Cwd) != cwd {
		t.Errorf("exe %q, cwd %q; want %q, %q", e.Exe, e.Cwd, exe, cwd)
	}
	if c.file != "" && filepath.Base(string(e.File)) != c.file {
		t.Errorf("file %q, want %q", e.File, c.file)
	}
	var st unix.Stat_t
	must(t, unix.Stat(fmt.Sprintf("/proc/%d/exe", pid), &st))
	var fs unix.Statfs_t
	must(t, unix.Statfs(fmt.Sprintf("/proc/%d/exe", pid), &fs))
	if e.ExeFile.Ino != st.Ino || uint64(e.ExeFile.Nlink) != uint64(st.Nlink) || e.ExeFile.Magic != uint64(fs.Type) {
		t.Errorf("file %+v, want ino %d nlink %d magic %#x", e.ExeFile, st.Ino, st.Nlink, fs.Type)
	}
}

// inMountNS runs a test in a mount namespace of its own, with a fresh tmpfs at
// dir. The namespace and all mounts in it end with the thread and the
// processes it started.
func inMountNS(t *testing.T, test func(dir string)) {
	dir := t.TempDir()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked
		if err := errors.Join(unix.Unshare(unix.CLONE_NEWNS), unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
			unix.Mount("none", dir, "tmpfs", 0, "")); err != nil {
			t.Error(err)
			return
		}
		test(dir)
	}()
	<-done
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
		runtime.Goexit() // t.FailNow belongs to the test's own goroutine
	}
}

func inDir(name string) func(prog, dir string) string {
	return func(_, dir string) string { return dir + "/" + name }
}

func text(s string) func(prog, dir string) string {
	return func(string, string) string { return s }
}

func plain(t *testing.T, prog, dir string) *exec.Cmd { return exec.Command(dir+"/prog", "w") }

// byFD runs an open file. The child has it under the same number until exec.
func byFD(fd int) *exec.Cmd { return exec.Command("/proc/self/fd/"+strconv.Itoa(fd), "w") }

func closing(t *testing.T, fd int) int {
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func openFile(t *testing.T, name string) int {
	t.Helper()
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	must(t, err)
	return closing(t, fd)
}

func openOSFile(t *testing.T, name string) *os.File {
	t.Helper()
	f, err := os.Open(name)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// filled copies prog into an open file and gives a read-only descriptor of it:
// a file that is open for writing cannot be executed.
func filled(t *testing.T, fd int, prog string) int {
	t.Helper()
	b, err := os.ReadFile(prog)
	must(t, err)
	_, err = unix.Write(fd, b)
	must(t, err)
	ro, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	must(t, err)
	unix.Close(fd)
	return closing(t, ro)
}

func memfd(t *testing.T, prog, name string) *exec.Cmd {
	t.Helper()
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	must(t, err)
	return byFD(filled(t, fd, prog))
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	must(t, err)
	must(t, os.WriteFile(to, b, 0o755))
}

// overlay runs one of three files of an overlay mount.
func overlay(name string) func(t *testing.T, prog, dir string) *exec.Cmd {
	return func(t *testing.T, prog, dir string) *exec.Cmd {
		for _, d := range []string{"l", "u", "w", "m"} {
			must(t, os.Mkdir(dir+"/"+d, 0o755))
		}
		copyFile(t, prog, dir+"/l/low")
		copyFile(t, prog, dir+"/l/copied")
		must(t, unix.Mount("overlay", dir+"/m", "overlay", 0, fmt.Sprintf("lowerdir=%[1]s/l,upperdir=%[1]s/u,workdir=%[1]s/w", dir)))
		copyFile(t, prog, dir+"/m/up")
		f, err := os.OpenFile(dir+"/m/copied", os.O_WRONLY|os.O_APPEND, 0)
		must(t, err)
		_, err = io.Copy(f, bytes.NewReader([]byte("x")))
		must(t, errors.Join(err, f.Close()))
		return exec.Command(dir+"/m/"+name, "w")
	}
}

// deep runs a file below n directories with names of the given length.
func deep(n, length int) func(t *testing.T, prog, dir string) *exec.Cmd {
	return func(t *testing.T, prog, dir string) *exec.Cmd {
		d := dir
		for range n {
			d += "/" + strings.Repeat("d", length)
		}
		must(t, os.MkdirAll(d, 0o755))
		copyFile(t, prog, d+"/prog")
		cmd := exec.Command(d+"/prog", "w")
		cmd.Dir = d
		return cmd
	}
}
