package recording

import (
	"encoding/binary"
	"fmt"

	"github.com/procession-dev/procession/internal/event"
)

// A codec writes or reads one entry field by field, so that the order of the
// fields is written down once. A reader that meets bad input latches err and
// gives zeros; it is asked once, at the end.
type codec interface {
	u64(*uint64)
	text(*[]byte)
	fail(why string)
}

// num passes a number of any size and sign through a codec. One that does not
// fit is bad input: cut to its size it would be another kind, or another pid.
func num[T ~uint8 | ~uint16 | ~uint32 | ~uint64 | ~int32](c codec, v *T) {
	u := uint64(*v)
	c.u64(&u)
	if *v = T(u); uint64(*v) != u {
		c.fail(fmt.Sprintf("number %d does not fit its field", u))
	}
}

func yesNo(c codec, v *bool) {
	var u uint64
	if *v {
		u = 1
	}
	c.u64(&u)
	if *v = u != 0; u > 1 {
		c.fail(fmt.Sprintf("number %d is neither yes nor no", u))
	}
}

func (h *Header) fields(c codec) {
	wall := uint64(h.Wall)
	c.u64(&wall)
	h.Wall = int64(wall)
	c.u64(&h.Stamp)
	c.u64(&h.Boot)
	for _, s := range []*string{&h.Kernel, &h.Mode} {
		b := []byte(*s)
		c.text(&b)
		*s = string(b)
	}
}

func (l *Loss) fields(c codec) {
	num(c, &l.Cause)
	num(c, &l.CPU)
	num(c, &l.Events)
	num(c, &l.Since)
	num(c, &l.Until)
}

func (p *Baseline) fields(c codec) {
	num(c, &p.PID)
	facts(c, &p.Facts)
}

func record(c codec, r *event.Record) {
	num(c, &r.Kind)
	num(c, &r.CPU)
	num(c, &r.Seq)
	num(c, &r.Stamp)
	num(c, &r.PID)
	num(c, &r.TGID)
	num(c, &r.PeerPID)
	num(c, &r.PeerTGID)
	num(c, &r.PeerStart)
	num(c, &r.ID)
	num(c, &r.EID)
	num(c, &r.Status)
	num(c, &r.ExitSignal)
	num(c, &r.RealParent)
	num(c, &r.RunTime)
	num(c, &r.MaxRSS)
	facts(c, &r.Facts)
}

func facts(c codec, f *event.Facts) {
	num(c, &f.Have)
	num(c, &f.From)
	num(c, &f.Start)
	yesNo(c, &f.StartTicks)
	num(c, &f.PPID)
	num(c, &f.ParentStart)
	for _, id := range []*uint32{&f.UID, &f.GID, &f.SUID, &f.SGID, &f.EUID, &f.EGID, &f.FSUID, &f.FSGID} {
		num(c, id)
	}
	num(c, &f.CapPermitted)
	num(c, &f.CapEffective)
	for _, ns := range []*uint32{&f.NS.PID, &f.NS.Mnt, &f.NS.User, &f.NS.Net} {
		num(c, ns)
	}
	num(c, &f.InnerPID)
	num(c, &f.SID)
	num(c, &f.TTY)
	num(c, &f.LoginUID)
	num(c, &f.AuditSession)
	yesNo(c, &f.NoNewPrivs)
	num(c, &f.Threads)
	num(c, &f.ExeFile.Dev)
	num(c, &f.ExeFile.Ino)
	num(c, &f.ExeFile.Mode)
	num(c, &f.ExeFile.UID)
	num(c, &f.ExeFile.GID)
	num(c, &f.ExeFile.Nlink)
	num(c, &f.ExeFile.Magic)
	num(c, &f.Marks)
	for _, t := range []*[]byte{&f.Comm, &f.Exe, &f.File, &f.Cmdline, &f.Cwd, &f.Cgroup} {
		c.text(t)
	}
	num(c, &f.CmdlineLen)
}

// An encoder appends fields to b: numbers as varints, text with its length.
type encoder struct{ b []byte }

func (e *encoder) u64(v *uint64) { e.b = binary.AppendUvarint(e.b, *v) }

func (e *encoder) text(v *[]byte) {
	e.b = binary.AppendUvarint(e.b, uint64(len(*v)))
	e.b = append(e.b, *v...)
}

func (e *encoder) fail(string) {} // what has its type fits

// A decoder takes fields from the front of b. Text stays in b: it is valid as
// long as the block is.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) u64(v *uint64) {
	u, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.fail("a number is cut off")
		*v = 0
		return
	}
	d.b = d.b[n:]
	*v = u
}

func (d *decoder) text(v *[]byte) {
	var n uint64
	d.u64(&n)
	if n > uint64(len(d.b)) {
		d.fail(fmt.Sprintf("a text of %d bytes is cut off after %d", n, len(d.b)))
		n = 0
	}
	*v = d.b[:n:n]
	d.b = d.b[n:]
}

func (d *decoder) fail(why string) {
	if d.err == nil {
		d.err = fmt.Errorf("%s", why)
	}
	d.b = nil
}
