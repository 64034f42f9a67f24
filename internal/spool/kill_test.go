package spool

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"
	"time"
)

const killDir = "SPOOL_TEST_KILL_DIR" // set: this process is the one to be killed

// killText is what a record must be, told from its name alone.
func killText(e Epoch, seq uint64) string {
	return fmt.Sprintf("%s %d %s", e, seq, payload(int(seq), int(seq*13%700)))
}

// TestKillChild is no test but the process that TestKill kills. It tells on
// stdout what it was promised: "made" after Append returned, "durable" after
// Read said so, which with so little patience it does not always.
func TestKillChild(t *testing.T) {
	dir := os.Getenv(killDir)
	if dir == "" {
		t.Skip("runs in a process of its own")
	}
	s, err := Open(Config{Dir: dir, SegmentBytes: 32 << 10, MaxRecord: 2000, Patience: time.Nanosecond})
	if err != nil {
		fmt.Println("error", err)
		return
	}
	go s.Run(context.Background())
	e := own(s).Epoch
	fmt.Println("epoch", e, 0)
	go func() {
		var c Chunk
		for after := uint64(0); ; {
			ch := s.Changed()
			if s.Read(e, after, 1000, 1<<20, &c) == nil {
				after = c.Last
				if n := len(c.Records); n > 0 && c.Records[n-1].Durable {
					fmt.Println("durable", e, after)
				}
				continue
			}
			<-ch
		}
	}()
	rnd := rand.New(rand.NewPCG(uint64(os.Getpid()), 0))
	for seq := uint64(1); ; {
		for range 1 + rnd.IntN(100) {
			if _, err := s.Append([]byte(killText(e, seq))); err != nil {
				fmt.Println("error", err)
				return
			}
			seq++
		}
		fmt.Println("made", e, seq-1)
		for s.Stats().Queued > 2000 {
			<-s.Changed()
		}
		time.Sleep(time.Duration(rnd.IntN(500)) * time.Microsecond) // a load, not a wait
	}
}

// kill -9 at any moment: no durable record is lost, none is another, and what
// was given a number and did not get to the disk is named exactly.
func TestKill(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	dir := t.TempDir()
	var records, crashed uint64
	for round := range 20 {
		e, made, durable := killOne(t, dir, time.Duration(rnd.IntN(40_000))*time.Microsecond)
		if e == (Epoch{}) {
			continue // killed before it had one
		}
		s, err := Open(Config{Dir: dir})
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		var lane Lane
		for _, l := range s.Lanes() {
			if l.Epoch == e {
				lane = l
			}
		}
		if lane.Made < made || lane.Made > made+100 { // it tells after each burst
			t.Fatalf("round %d: made %d, told %d", round, lane.Made, made)
		}
		if lane.Made > 0 {
			next := uint64(1)
			for _, g := range readAll(t, s, e, 0) {
				switch {
				case g.Reason == "" && g.Text != killText(e, g.From):
					t.Fatalf("round %d: record %d is %.80q", round, g.From, g.Text)
				case g.Reason == "":
					records++
				case g.Reason != "crash" || g.To != lane.Made || g.From <= durable:
					t.Fatalf("round %d: %+v, durable were %d, made %d", round, g, durable, lane.Made)
				default:
					crashed += g.To - g.From + 1
				}
				next = g.To + 1
			}
			if next != lane.Made+1 {
				t.Fatalf("round %d: covered up to %d, made %d", round, next-1, lane.Made)
			}
			if err := s.Ack(e, lane.Made); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d records, %d named as lost by a crash", records, crashed)
	if records < 1000 {
		t.Errorf("only %d records: the test tests nothing", records)
	}
}

// killOne runs the child, kills it after it has lived for d, and returns what it told.
func killOne(t *testing.T, dir string, d time.Duration) (e Epoch, made, durable uint64) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestKillChild$")
	cmd.Env = append(os.Environ(), killDir+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(out)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			if !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			break // what is behind the last newline was not told
		}
		var word, epoch string
		var n uint64
		if _, err := fmt.Sscan(line, &word, &epoch, &n); err != nil {
			t.Fatalf("child: %q", line)
		}
		switch word {
		case "epoch":
			hex.Decode(e[:], []byte(epoch))
			time.AfterFunc(d, func() { cmd.Process.Kill() })
		case "made":
			made = n
		case "durable":
			durable = n
		default:
			t.Fatalf("child: %q", line)
		}
	}
	cmd.Wait() // killed: an error, of course
	return e, made, durable
}
