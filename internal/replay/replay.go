// Package replay takes a recording through the process table and the
// enrichment again: recording → Event, the same ones in the same order on any
// machine, without a connector, without /proc, and without waiting.
//
// What the recording lacks stays missing: a process that nobody recorded is
// unknown here, whatever runs on this machine under its pid. Losses that were
// recorded are counted, not filled by a scan: the machine they happened on is
// elsewhere.
package replay

import (
	"bufio"
	"errors"
	"io"
	"log/slog"
	"time"

	"github.com/procession-dev/procession/internal/enrich"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/proctable"
	"github.com/procession-dev/procession/internal/recording"
)

// A Replay is a recording on its way through the pipeline. Its counts are
// those of what Run has read so far.
type Replay struct {
	Header    recording.Header
	Processes uint64 // that ran when the recording began
	Records   uint64
	Events    uint64 // made of the records, and handed on
	Lost      uint64 // events the kernel could not hand over while it was recorded
	Cut       bool   // the recording's writer was killed: what it had not written is not here

	in    *recording.Reader
	table *proctable.Table
	who   *enrich.Enricher
	at    proctable.Instant
	tick  uint64 // stamp of the table's last tick
}

// tickEvery is how often the table forgets who ended long ago, in the
// recording's time, ns. The live pipeline does it after each drain.
const tickEvery = uint64(time.Second)

// Open reads the recording's header. log is told what the process table has
// to say; nil: nobody is.
func Open(r io.Reader, log *slog.Logger) (*Replay, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	in, err := recording.NewReader(bufio.NewReaderSize(r, 1<<20))
	if err != nil {
		return nil, err
	}
	h := in.Header
	clock := proctable.FixedClock{Mono: h.Stamp, Boot: h.Boot, Wall: time.Unix(0, h.Wall)}
	table, err := proctable.New(proctable.Config{Clock: clock, Log: log})
	if err != nil {
		return nil, err
	}
	return &Replay{Header: h, in: in, table: table, who: enrich.New(enrich.Config{}), at: clock.Now(), tick: h.Stamp}, nil
}

// Wall turns a process's start into wall time, by the clock of the machine
// the recording comes from.
func (r *Replay) Wall(boot uint64) time.Time {
	return r.at.Wall.Add(time.Duration(boot) - time.Duration(r.at.Boot))
}

// Run reads to the end and calls use for each event; the event is valid until
// use returns. A recording that was cut off is read up to its last whole block
// and reported as recording.ErrCut, a damaged one as recording.DamageError:
// what came before was handed on in both cases.
func (r *Replay) Run(use func(*event.Event)) error {
	var ev event.Event
	for {
		e, err := r.in.Next()
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			r.Cut = errors.Is(err, recording.ErrCut)
			return err
		case e.Process != nil:
			// The baseline goes in as execs that nobody judges.
			r.Processes++
			ev.Reset()
			r.table.Apply(&event.Record{
				Kind: event.Exec, Stamp: r.Header.Stamp, PID: e.Process.PID, TGID: e.Process.PID, Facts: e.Process.Facts,
			}, &ev)
		case e.Record != nil:
			r.Records++
			if s := e.Record.Stamp; s > r.tick+tickEvery {
				r.table.Tick(s)
				r.tick = s
			}
			ev.Reset()
			if r.table.Apply(e.Record, &ev) {
				r.Events++
				r.who.Event(&ev)
				use(&ev)
			}
		case e.Loss != nil:
			r.Lost += e.Loss.Events
		}
	}
}
