package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/procconn"
	"github.com/procession-dev/procession/internal/proctable"
	"github.com/procession-dev/procession/internal/recording"
)

const recordHelp = `
Usage: agent record [flags] FILE

Writes what the kernel says about processes to a file, to be judged later and
elsewhere with "agent replay". "listening" appears on stderr once events are
proven to arrive. The file holds the arguments of every process: it is made
readable to its owner only.

  agent record --duration 1h monday.rec
`

func recordCommand(args []string, stdout, stderr io.Writer) error {
	fs := newFlags("record")
	duration := fs.Duration("duration", 0, "stop after this time; 0 is never")
	mode := fs.String("recorder", "auto", "use of the eBPF recorder: auto, off, require")
	file, err := parseFile(fs, recordHelp, args, stdout)
	if err != nil {
		return err
	}
	if err := checkCapture(*mode, 0, *duration); err != nil {
		return err
	}
	log, err := newLog(stderr, "text", "warn")
	if err != nil {
		return err
	}
	ctx, stop := untilSignal(context.Background())
	defer stop()
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return usagef("%s exists already: a recording is not overwritten", file)
	}
	if err != nil {
		return err
	}
	defer f.Close()

	conn, err := procconn.Open(ctx, procconn.Config{Recorder: procconn.Mode(*mode), Cwd: true, Log: log})
	if err != nil {
		os.Remove(file)
		return err
	}
	defer conn.Close()
	pipe, err := newPipeline(log, func(*event.Event) {}, nil)
	if err != nil {
		return err
	}
	if _, err := pipe.table.Scan(); err != nil {
		return err
	}
	rec := &recorder{stop: stop, began: time.Now(), prompt: newPrompter()}
	rec.prompt.start(rec.began)
	if rec.w, err = recording.NewWriter(f, header(pipe.now, string(conn.Status().Way))); err != nil {
		return err
	}
	if err := rec.baseline(pipe.table); err != nil {
		return err
	}
	fmt.Fprintln(stderr, "listening")
	if *duration > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, *duration)
		defer cancel()
	}
	err = conn.Run(ctx, rec)
	if rec.check(rec.w.Close()); rec.err == nil {
		rec.check(f.Sync())
	}
	err = errors.Join(err, rec.err)
	fmt.Fprintf(stderr, "%s: %d entries, %d bytes, %v\n", file, rec.w.Entries, rec.w.Bytes, time.Since(rec.began).Round(time.Second))
	return err
}

func header(at proctable.Instant, way string) recording.Header {
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return recording.Header{Wall: at.Wall.UnixNano(), Stamp: at.Mono, Boot: at.Boot, Kernel: strings.TrimSpace(string(kernel)), Mode: way}
}

// A recorder is the handler that writes everything down.
type recorder struct {
	w       *recording.Writer
	began   time.Time
	flushed time.Time
	prompt  prompter
	err     error
	stop    func() // the disk refuses: there is nothing more to do
}

// baseline writes the processes that run already, parents first.
func (r *recorder) baseline(t *proctable.Table) error {
	procs := slices.SortedFunc(t.All(), func(a, b *event.Process) int {
		return cmp.Or(cmp.Compare(a.Start, b.Start), cmp.Compare(a.PID, b.PID))
	})
	for _, p := range procs {
		if err := r.w.Process(&recording.Baseline{PID: p.PID, Facts: factsOf(p)}); err != nil {
			return err
		}
	}
	return r.w.Flush()
}

// factsOf is what is known of a process in the table, as if it had just been
// read.
func factsOf(p *event.Process) event.Facts {
	f := event.Facts{
		From: event.SourceProc, Start: p.Start, StartTicks: !p.StartExact, PPID: p.PPID, ParentStart: p.ParentStart,
		IDs: p.IDs, CapPermitted: p.CapPermitted, CapEffective: p.CapEffective, NS: p.NS, InnerPID: p.InnerPID,
		SID: p.SID, TTY: p.TTY, LoginUID: p.LoginUID, AuditSession: p.AuditSession, NoNewPrivs: p.NoNewPrivs,
		ExeFile: p.ExeFile, Marks: p.Marks, Comm: []byte(p.Name), Exe: []byte(p.Exe), File: []byte(p.File),
		Cmdline: []byte(p.Cmdline), CmdlineLen: p.CmdlineLen, Cwd: []byte(p.Cwd), Cgroup: []byte(p.Cgroup),
	}
	for i := range event.NumFields {
		if p.Has(i) {
			f.Have |= event.FieldSet(i)
		}
	}
	return f
}

// Record implements procconn.Handler.
func (r *recorder) Record(rec *event.Record) { r.check(r.w.Record(rec)) }

// Lost implements procconn.Handler.
func (r *recorder) Lost(l procconn.Loss) {
	r.check(r.w.Loss(recording.Loss{Cause: uint8(l.Cause), CPU: int32(l.CPU), Events: l.Count, Since: l.Since, Until: l.Until}))
}

// Idle implements procconn.Handler: at most a second of a recording is lost
// when its writer is killed.
func (r *recorder) Idle() {
	now := time.Now()
	r.prompt.look(now)
	if now.Sub(r.flushed) >= time.Second {
		r.flushed = now
		r.check(r.w.Flush())
	}
}

func (r *recorder) check(err error) {
	if err != nil && r.err == nil {
		r.err = err
		r.stop()
	}
}
