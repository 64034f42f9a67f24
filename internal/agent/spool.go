package agent

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/present"
	"github.com/procession-dev/procession/internal/spool"
)

const spoolHelp = `agent spool looks into the alerts that wait on disk. It only reads, and works
while an agent runs.

Usage:
  agent spool dump [--format text|json] [FOLDER]   print every alert and loss, then a summary per epoch
  agent spool verify [FOLDER]                      read everything, name every damaged place

FOLDER is the spool's folder, by default /var/lib/procession/spool. verify exits
with 1 when something is damaged.
`

const defaultSpool = "/var/lib/procession/spool"

func spoolCommand(args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		fmt.Fprint(stderr, spoolHelp)
		return usagef("dump or verify is missing")
	}
	switch args[0] {
	case "--help", "-h", "help":
		fmt.Fprint(stdout, spoolHelp)
		return nil
	case "dump", "verify":
	default:
		return usagef("unknown command %q; agent spool --help lists them", args[0])
	}
	fs := newFlags("spool " + args[0])
	format := "auto"
	if args[0] == "dump" {
		fs.StringVar(&format, "format", "auto", "text, json (one object a line), or auto: text on a terminal, else json")
	}
	dir, err := parseOne(fs, spoolHelp, args[1:], stdout)
	if err != nil {
		return err
	}
	dir = cmp.Or(dir, defaultSpool)
	out := bufio.NewWriter(stdout)
	defer out.Flush()
	if args[0] == "verify" {
		rep, err := spool.Verify(dir, out)
		if err != nil {
			return err
		}
		if rep.Damaged > 0 {
			return fmt.Errorf("%d damaged places in %s", rep.Damaged, dir)
		}
		return nil
	}
	switch format {
	case "auto":
		if _, terminal, _ := present.StyleFor(stdout, "auto"); !terminal {
			format = "json"
		}
	case "text", "json":
	default:
		return usagef("--format: %q is none of auto, text, json", format)
	}
	return dump(dir, format == "json", out)
}

// dump prints each item as the collector would, then a line per epoch.
func dump(dir string, asJSON bool, out io.Writer) error {
	var buf []byte
	style := present.Style{}
	rep, err := spool.Inspect(dir, func(it *spool.Item) error {
		id := present.Identity{Cluster: "-", Node: "-", Epoch: it.Epoch}
		buf = buf[:0]
		switch {
		case it.Record != nil:
			id.Seq = it.Record.Seq
			var item pb.Item
			if err := proto.Unmarshal(it.Record.Payload, &item); err != nil {
				return damaged(out, asJSON, it, fmt.Errorf("record %d is no item: %w", it.Record.Seq, err))
			}
			ok := false
			if asJSON {
				buf, ok = present.AppendItemJSON(buf, id, &item)
			} else {
				buf, ok = style.AppendItemLine(buf, id, &item)
			}
			if !ok {
				return damaged(out, asJSON, it, fmt.Errorf("record %d is an item of a kind this version does not know", it.Record.Seq))
			}
		case it.Loss != nil:
			l := &pb.Loss{From: it.Loss.From, To: it.Loss.To, Reason: pb.LossReason(it.Loss.Reason), Detail: it.Loss.Detail}
			if asJSON {
				buf = present.AppendLossJSON(buf, id, time.Time{}, l)
			} else {
				buf = style.AppendLossLine(buf, id, time.Time{}, l)
			}
		default:
			return damaged(out, asJSON, it, it.Damage)
		}
		_, err := out.Write(append(buf, '\n'))
		return err
	})
	if err != nil {
		return err
	}
	return summary(out, asJSON, rep)
}

func damaged(out io.Writer, asJSON bool, it *spool.Item, err error) error {
	if !asJSON {
		_, err = fmt.Fprintf(out, "damaged: %s at byte %d, %d bytes: %v\n", it.File, it.Offset, it.Length, err)
		return err
	}
	return json.NewEncoder(out).Encode(map[string]any{
		"type": "damage", "file": it.File, "offset": it.Offset, "length": it.Length, "error": err.Error(),
	})
}

func summary(out io.Writer, asJSON bool, rep *spool.Report) error {
	if asJSON {
		enc := json.NewEncoder(out)
		for _, e := range rep.Epochs {
			if err := enc.Encode(map[string]any{
				"type": "epoch", "epoch": e.Epoch.String(), "made": e.Made, "records": e.Records, "acked": e.Acked,
				"evicted": e.Evicted, "first": e.First, "highest": e.Highest, "sealed": e.Sealed,
			}); err != nil {
				return err
			}
		}
		return nil
	}
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "EPOCH\tMADE\tON DISK\tACKED\tEVICTED\t")
	for _, e := range rep.Epochs {
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t\n", e.Epoch, e.Made, e.Records, e.Acked, e.Evicted)
	}
	fmt.Fprintf(w, "\n")
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(out, "%d segments, %d bytes, %d records, %d damaged places\n", rep.Segments, rep.Bytes, rep.Records, rep.Damaged)
	return err
}
