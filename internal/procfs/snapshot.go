package procfs

import (
	"bytes"
	"errors"

	"github.com/procession-dev/procession/internal/event"
)

// A Reading is all that /proc says about one process, read in one go. It is
// reusable: its text lies in its own buffer and is valid until the next Read.
type Reading struct {
	event.Facts      // From is SourceProc; Have says what could be read
	Stat        Stat // as of the end of the reading

	buf []byte
}

// readings is how often a Reading starts over when the process changed under
// it. A process that execs faster than it can be read is not worth more.
const readings = 3

// Snapshot fills f with what /proc says about pid, with at most
// DefaultMaxArgs bytes of arguments. Text lies in buf, which is grown as
// needed and handed back. See Read.
func (fs *FS) Snapshot(pid int32, f *event.Facts, buf []byte) ([]byte, error) {
	r := Reading{buf: buf}
	err := fs.Read(pid, DefaultMaxArgs, &r)
	*f = r.Facts
	return r.buf, err
}

// Read fills r with what /proc says about pid, with at most maxArgs bytes of
// arguments (0: none are read). The start time is exact to a Tick. A fact
// that may not be read, or that the process does not have, is missing; an
// error is ErrGone, ErrNotProcess, or trouble with the file system itself. A
// zombie is no error: r.Stat.Dead says so.
func (fs *FS) Read(pid int32, maxArgs int, r *Reading) error {
	var before Stat
	for try := 1; ; try++ {
		if err := fs.Stat(pid, &before); err != nil {
			return err
		}
		err := fs.readOnce(pid, maxArgs, &before, r)
		// A thread that was read through may end while the process goes on.
		if err != nil && (!errors.Is(err, ErrGone) || try == readings) {
			return err
		}
		gone := err != nil
		if err := fs.Stat(pid, &r.Stat); err != nil {
			return err
		}
		switch {
		case gone:
		case r.Stat.StartTicks != before.StartTicks:
			if try == readings {
				return ErrGone
			}
		case r.Stat.Exiting() == before.Exiting() && r.Stat.sameProgram(&before):
			r.finish(maxArgs)
			return nil
		case try == readings:
			r.finish(maxArgs)
			r.Have &^= programFields
			return nil
		}
	}
}

// programFields are the facts that an exec replaces.
var programFields = event.FieldSet(event.FieldName, event.FieldExe, event.FieldArgs, event.FieldCwd,
	event.FieldExeFile, event.FieldIDs, event.FieldCaps)

// readOnce reads everything but the closing Stat.
func (fs *FS) readOnce(pid int32, maxArgs int, st *Stat, r *Reading) error {
	r.Facts = event.Facts{From: event.SourceProc}
	r.buf = r.buf[:0]

	// A first thread that has ended shows neither program nor arguments nor
	// (on v1) cgroup, but the process goes on in its other threads.
	task := pid
	if st.Exiting() && st.Threads > 1 {
		tid, err := fs.liveThread(pid)
		if err != nil && !errors.Is(err, ErrGone) {
			return err
		}
		if err == nil {
			task = tid
		}
	}

	// cmdline and exe die first, cgroup and ids stay until a zombie is reaped.
	var cmdline, exe, cwd, cgroup span
	var err error
	if cmdline, err = r.text(event.FieldArgs, func(b []byte) ([]byte, error) {
		if maxArgs <= 0 {
			return b, ErrMissing
		}
		return fs.AppendCmdline(b, task, maxArgs+1) // one more, to see that it is cut
	}); err != nil {
		return err
	}
	if exe, err = r.text(event.FieldExe, func(b []byte) ([]byte, error) { return fs.AppendExe(b, task) }); err != nil {
		return err
	}
	if cwd, err = r.text(event.FieldCwd, func(b []byte) ([]byte, error) { return fs.AppendCwd(b, task) }); err != nil {
		return err
	}
	if cgroup, err = r.text(event.FieldCgroup, func(b []byte) ([]byte, error) { return fs.AppendCgroup(b, task) }); err != nil {
		return err
	}
	r.Cmdline, r.Exe, r.Cwd, r.Cgroup = cmdline.of(r.buf), exe.of(r.buf), cwd.of(r.buf), cgroup.of(r.buf)
	return fs.readNumbers(pid, task, r)
}

// readNumbers reads the facts that are not text.
func (fs *FS) readNumbers(pid, task int32, r *Reading) error {
	var s Status
	switch err := fs.Status(task, &s); {
	case err == nil:
		if s.TGID != pid {
			return ErrNotProcess
		}
		r.setStatus(&s)
	case !errors.Is(err, ErrMissing):
		return err
	}
	ok, err := there(fs.ExeFile(task, &r.ExeFile))
	if err != nil {
		return err
	}
	r.have(event.FieldExeFile, ok)

	ns, err := fs.NS(task)
	if ok, err = there(err); err != nil {
		return err
	}
	r.NS = ns
	r.have(event.FieldNS, ok)

	login, err := fs.LoginUID(task)
	if ok, err = there(err); err != nil || !ok {
		return err
	}
	session, err := fs.SessionID(task)
	if ok, err = there(err); err != nil {
		return err
	}
	r.LoginUID, r.AuditSession = login, session
	r.have(event.FieldLogin, ok)
	return nil
}

func (r *Reading) setStatus(s *Status) {
	r.IDs = s.IDs()
	r.have(event.FieldIDs, s.HasIDs())
	r.CapPermitted, r.CapEffective = s.CapPrm, s.CapEff
	r.have(event.FieldCaps, s.HasCaps())
	r.NoNewPrivs = s.NoNewPrivs
	r.have(event.FieldNNP, s.HasNoNewPrivs())
	r.InnerPID = s.InnerPID
}

// finish takes over what the closing Stat says.
func (r *Reading) finish(maxArgs int) {
	st := &r.Stat
	r.Start, r.StartTicks = st.Start(), true
	r.PPID, r.SID, r.TTY, r.Threads = st.PPID, st.Session, st.TTY, st.Threads
	r.Comm = st.Comm()
	r.Have |= event.FieldSet(event.FieldStart, event.FieldParent, event.FieldSession)
	r.have(event.FieldName, len(r.Comm) > 0)
	r.CmdlineLen = uint32(len(r.Cmdline))
	if len(r.Cmdline) > maxArgs {
		// Only a cut text needs the true length from elsewhere: a process
		// that rewrote its arguments may show fewer bytes than it has.
		r.Cmdline = r.Cmdline[:maxArgs]
		if st.ArgsLen > uint64(maxArgs) && st.ArgsLen < 1<<31 {
			r.CmdlineLen = uint32(st.ArgsLen)
		}
	}
	if r.Have.Has(event.FieldExeFile) && r.ExeFile.Nlink == 0 && bytes.HasPrefix(r.Exe, []byte("/memfd:")) {
		r.Marks |= event.MarkMemfd
	}
}

func (r *Reading) have(f event.Field, ok bool) {
	if ok {
		r.Have |= event.FieldSet(f)
	}
}

// A span is a piece of a Reading's buffer, which moves while it grows.
type span struct{ from, to int }

func (s span) of(b []byte) []byte { return b[s.from:s.to:s.to] }

// text appends a text to the buffer and notes that it is there.
func (r *Reading) text(f event.Field, add func([]byte) ([]byte, error)) (span, error) {
	from := len(r.buf)
	b, err := add(r.buf)
	ok, err := there(err)
	if err != nil {
		return span{}, err
	}
	r.buf = b
	r.have(f, ok && len(b) > from)
	return span{from, len(b)}, nil
}

// there turns ErrMissing into an answer.
func there(err error) (bool, error) {
	if errors.Is(err, ErrMissing) {
		return false, nil
	}
	return err == nil, err
}
