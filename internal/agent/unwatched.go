package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
)

// A node without an agent is watched by nobody, and nothing of what happens
// there meanwhile can be told afterwards. So each run leaves signs of life in a
// file, and the next one says from when to when there was none, and why.
//
// The file is written every signEvery and never synced: after a power cut it is
// some seconds older than the truth, and the time that is named as unwatched
// longer, never shorter.

const (
	signFile  = "alive"
	signEvery = 5 * time.Second

	// signSize is the length of a sign: it is written over the one before, and
	// so small that a kill cannot tear it.
	signSize = 192
)

// A sign of life is when somebody watched last.
type sign struct {
	boot    string        // which start of the node
	up      time.Duration // since then, time asleep included
	wall    time.Time
	stopped bool // it was asked to end, and watches no more
}

// signNow reads the clocks.
func signNow() (sign, error) {
	up, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return sign{}, err
	}
	first, _, _ := strings.Cut(string(up), " ")
	seconds, err := strconv.ParseFloat(first, 64)
	if err != nil {
		return sign{}, fmt.Errorf("/proc/uptime: %w", err)
	}
	boot := bootID()
	if boot == "" {
		return sign{}, errors.New("the node's boot id cannot be read")
	}
	return sign{boot: boot, up: time.Duration(seconds * float64(time.Second)), wall: time.Now()}, nil
}

// encode is a line of text, with its checksum, filled up to signSize.
func (s sign) encode() []byte {
	state := "running"
	if s.stopped {
		state = "stopped"
	}
	text := fmt.Sprintf("procession-alive 1 %s %d %d %s", s.boot, s.up.Nanoseconds(), s.wall.UnixNano(), state)
	b := bytes.Repeat([]byte{' '}, signSize)
	b[signSize-1] = '\n'
	copy(b, fmt.Sprintf("%s %08x", text, crc32.ChecksumIEEE([]byte(text))))
	return b
}

// parseSign reads what encode wrote, and nothing else.
func parseSign(b []byte) (sign, error) {
	bad := func(what string) (sign, error) { return sign{}, fmt.Errorf("sign of life: %s in %.64q", what, b) }
	f := strings.Fields(string(b))
	if len(b) != signSize || len(f) != 7 || f[0] != "procession-alive" || f[1] != "1" {
		return bad("not a line of this version")
	}
	up, err1 := strconv.ParseInt(f[3], 10, 64)
	wall, err2 := strconv.ParseInt(f[4], 10, 64)
	s := sign{boot: f[2], up: time.Duration(up), wall: time.Unix(0, wall).UTC(), stopped: f[5] == "stopped"}
	if err1 != nil || err2 != nil || up < 0 || wall < 0 || !bytes.Equal(s.encode(), b) { // the checksum among it
		return bad("wrong checksum or number")
	}
	return s, nil
}

// readSign reads the last run's sign; fs.ErrNotExist when there was none.
func readSign(file string) (sign, error) {
	f, err := os.Open(file)
	if err != nil {
		return sign{}, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, signSize+1))
	if err != nil {
		return sign{}, err
	}
	return parseSign(b)
}

// Reasons why nobody watched.
const (
	unwatchedStopped  = "stopped"
	unwatchedDied     = "died"
	unwatchedRebooted = "rebooted"
	unwatchedUnknown  = "unknown"
)

// unwatchedSince is the time between the last sign of life and since, when
// recording began; now is read at the same moment as the clocks of the sign.
// Within one boot the node's uptime counts, whatever was done to its clock.
func unwatchedSince(last, now sign, since time.Time) *pb.Unwatched {
	u := &pb.Unwatched{Until: timestamppb.New(since), Reason: unwatchedDied}
	if last.stopped {
		u.Reason = unwatchedStopped
	}
	from := last.wall
	if last.boot == now.boot {
		from = now.wall.Add(min(0, last.up-now.up))
	} else {
		u.Reason = unwatchedRebooted
		u.Booted = timestamppb.New(now.wall.Add(-now.up))
	}
	if from.After(since) {
		from = since // a clock that was set back
	}
	u.From = timestamppb.New(from)
	return u
}

// openLife finds out what was not watched before this run, tells it, and gives
// what keeps the signs of life. It is called when events are heard, before the
// first is judged.
func (a *agent) openLife(file string) *life {
	l := newLife(file, a.log)
	since := a.conn.Status().Since
	last, err := readSign(file)
	if errors.Is(err, fs.ErrNotExist) {
		return l // the first run here
	}
	if err == nil {
		var now sign
		if now, err = signNow(); err == nil {
			a.unwatched = unwatchedSince(last, now, since)
		}
	}
	if err != nil {
		a.log.Warn("since when nobody watched this node cannot be told", "file", file, "err", err)
		a.unwatched = &pb.Unwatched{Until: timestamppb.New(since), Reason: unwatchedUnknown}
	}
	al := unwatchedAlert(a.unwatched)
	l.told = a.send(al) != 0
	a.log.Warn("nobody watched this node for a while", "from", a.unwatched.GetFrom().AsTime(), "until", since, "reason", a.unwatched.GetReason())
	return l
}

// unwatchedRule is the rule of the agent's own alert about it.
const unwatchedRule = "Procession//agent/not-watching"

// A gap as an upgrade makes it wakes nobody; a long one is worth a question.
const (
	shortGap = time.Minute
	longGap  = 10 * time.Minute
)

// unwatchedAlert tells of a time in which nobody watched.
func unwatchedAlert(u *pb.Unwatched) *pb.Alert {
	from, until := u.GetFrom().AsTime(), u.GetUntil().AsTime()
	length := until.Sub(from)
	al := &pb.Alert{
		Event: &pb.Event{Time: u.GetUntil(), Kind: "NodeState", Place: "host"},
		Rule:  unwatchedRule, Title: "Node was not watched", Tags: []string{"not-watching"},
		Evidence: []*pb.Evidence{{Field: "unwatched.until", Value: stamp(until)}, {Field: "unwatched.reason", Value: u.GetReason()}},
	}
	if u.GetFrom() != nil {
		al.Evidence = append(al.Evidence, &pb.Evidence{Field: "unwatched.from", Value: stamp(from)})
	}
	span := fmt.Sprintf("from %s to %s (%v)", stamp(from), stamp(until), length.Round(time.Second))
	al.Severity = pb.Severity_SEVERITY_LOW
	switch u.GetReason() {
	case unwatchedStopped:
		if length <= shortGap {
			al.Severity = pb.Severity_SEVERITY_INFORMATIONAL
		}
		al.Message = "Nobody watched this node " + span + ": the agent was stopped"
	case unwatchedDied:
		al.Message = "Nobody watched this node " + span + ": the agent was killed or failed"
	case unwatchedRebooted:
		// While the node was down there was nothing to watch.
		booted := u.GetBooted().AsTime()
		length = until.Sub(booted)
		al.Evidence = append(al.Evidence, &pb.Evidence{Field: "unwatched.booted", Value: stamp(booted)})
		al.Message = fmt.Sprintf("Nobody watched this node %s: it was started anew at %s, %v before the agent", span, stamp(booted), length.Round(time.Second))
	default:
		al.Message = "Nobody watched this node before " + stamp(until) + "; since when cannot be told"
		al.Severity = pb.Severity_SEVERITY_MEDIUM
	}
	if length > longGap {
		al.Severity = pb.Severity_SEVERITY_MEDIUM
	}
	return al
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// A life keeps the signs of life of a run.
type life struct {
	file string
	log  *slog.Logger
	told bool // an alert about the time before is on its way to the disk
	ctx  context.Context
	stop context.CancelFunc
	done chan struct{} // closed when run has ended
	f    *os.File      // of run's goroutine, then of end's caller
}

func newLife(file string, log *slog.Logger) *life {
	l := &life{file: file, log: log, done: make(chan struct{})}
	l.ctx, l.stop = context.WithCancel(context.Background())
	return l
}

// run leaves signs until end. What was told of the time before this run is
// on the disk first: until then the sign of the last run stays, so that a run
// that is killed at once leaves the next one to tell it.
func (l *life) run(sync func(context.Context) error) {
	defer close(l.done)
	if l.told && sync(l.ctx) != nil {
		return
	}
	failing := false
	tick := time.NewTicker(signEvery)
	defer tick.Stop()
	for {
		err := l.leave(false)
		if err != nil && !failing {
			l.log.Warn("signs of life cannot be left: should the agent die, the next one says that nobody watched since the last one", "file", l.file, "err", err)
		}
		failing = err != nil
		select {
		case <-l.ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// leave writes a sign over the one before.
func (l *life) leave(stopped bool) (err error) {
	s, err := signNow()
	if err != nil {
		return err
	}
	s.stopped = stopped
	if l.f == nil {
		if l.f, err = os.OpenFile(l.file, os.O_WRONLY|os.O_CREATE, 0o600); err != nil {
			return err
		}
	}
	if _, err := l.f.WriteAt(s.encode(), 0); err != nil {
		return err
	}
	if !stopped {
		return nil
	}
	return l.f.Sync()
}

// end leaves the last sign, when events are no longer heard; asked says whether
// somebody wanted that. It ends run.
func (l *life) end(asked bool) {
	l.stop()
	<-l.done
	if l.f == nil { // what this run had to tell is not on the disk
		return
	}
	if err := l.leave(asked); err != nil {
		l.log.Warn("the last sign of life cannot be left: the next run will say that this one died", "file", l.file, "err", err)
	}
	l.f.Close()
}
