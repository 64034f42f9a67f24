package terminal_test

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/present"
	"github.com/procession-dev/procession/internal/sink"
	"github.com/procession-dev/procession/internal/sink/terminal"
	"github.com/procession-dev/procession/internal/store"
)

func TestDeliver(t *testing.T) {
	recs := []store.Record{
		{Node: "n", Seq: 1, To: 3, Kind: store.Loss, Reason: "a\x1b[31mb", Received: time.Unix(0, 0)},
		{Node: "n", Seq: 4, To: 4, Kind: store.Rejected, Reason: "bad", Received: time.Unix(0, 0)},
	}
	for _, colour := range []bool{false, true} {
		var out bytes.Buffer
		if err := terminal.New(&out, present.Style{Color: colour}, "c").Deliver(t.Context(), recs); err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(out.String(), "\n")
		if len(lines) != 3 || !strings.Contains(lines[0], "LOST") || !strings.Contains(lines[1], "bad") || lines[2] != "" {
			t.Errorf("wrote %q", out.String())
		}
		if !colour && strings.Contains(out.String(), "\x1b") {
			t.Errorf("escape sequence without colours: %q", out.String())
		}
	}
}

// A reader that hung up ends the sink; it does not make it try for ever.
func TestReaderGone(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	r.Close()
	err = terminal.New(w, present.Style{}, "c").Deliver(t.Context(), []store.Record{{Kind: store.Loss, Seq: 1, To: 1}})
	if !errors.Is(err, sink.ErrGone) {
		t.Errorf("error %v, want ErrGone", err)
	}
}
