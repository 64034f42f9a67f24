package present

import (
	"flag"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestWriteFlags(t *testing.T) {
	fs := flag.NewFlagSet("x", flag.ContinueOnError)
	fs.String("state", "/var/lib/x", "`folder` of what is kept; made if missing, and never removed by this command, whatever happens")
	fs.Bool("watch", false, "show it again")
	fs.Duration("drain", 0, "how often (default 10ms)")
	fs.Duration("wait", time.Minute, "how `long`")
	var b strings.Builder
	if err := WriteFlags(&b, fs, FlagGroup{"Where", []string{"state"}}); err != nil {
		t.Fatal(err)
	}
	want := `Where:
  --state folder
      folder of what is kept; made if missing, and never removed by this
      command, whatever happens (default /var/lib/x)

Flags:
  --drain duration
      how often (default 10ms)
  --wait long
      how long (default 1m0s)
  --watch
      show it again
`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
