package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/procession-dev/procession/test/bench/host"
	"github.com/procession-dev/procession/test/vm/internal/wire"
)

// machine is the emulator for an architecture.
func machine(arch string) host.Tool {
	if arch == "arm64" {
		return host.Tool{Command: "qemu-system-aarch64", Package: "qemu-system-arm"}
	}
	return host.Tool{Command: "qemu-system-x86_64", Package: "qemu-system-x86"}
}

// qemuArgs starts a kernel on a machine with two CPUs, a serial port on
// standard output, and nothing else.
func qemuArgs(t target, im *image, initramfs string, o *options) []string {
	args := []string{"-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-serial", "stdio", "-nic", "none",
		"-no-reboot", "-smp", strconv.Itoa(o.cpus), "-m", strconv.Itoa(o.memory), "-kernel", im.vmlinuz(), "-initrd", initramfs}
	console := "ttyS0"
	if t.arch == "arm64" {
		// A CPU without pointer authentication: emulating that costs more
		// than everything else.
		args = append(args, "-M", "virt", "-cpu", "cortex-a72")
		console = "ttyAMA0"
	} else {
		// Without cmpxchg16b, as the emulator once came back from it with broken
		// flags, and the guest's allocator with it. Kernels do without.
		args = append(args, "-M", "pc", "-cpu", "max,-cx16")
	}
	if o.accel == "kvm" && t.arch == runtime.GOARCH {
		args = append(args, "-accel", "kvm")
	} else {
		args = append(args, "-accel", "tcg,thread=multi")
	}
	// loglevel=1: the kernel's own lines would fall into ours. A panic still shows.
	cmdline := "console=" + console + " loglevel=1 panic=-1 mitigations=off random.trust_cpu=on rdinit=/init"
	if t.append != "" {
		cmdline += " " + t.append
	}
	if o.append != "" {
		cmdline += " " + o.append
	}
	return append(args, "-append", cmdline)
}

// A boot is what came out of one VM.
type boot struct {
	guest   *wire.Guest // nil: it never came up
	output  map[int]*bytes.Buffer
	ends    map[int]wire.End
	kmsg    []string
	faults  []string // of guest or transport, any of them makes the boot a failure
	upAfter time.Duration
	took    time.Duration
	console []byte // everything that was no frame
}

const mostConsole = 256 << 10

// start runs the VM until it powers off or ctx ends, and collects its frames.
func start(ctx context.Context, log io.Writer, t target, args []string, job *wire.Job, raw io.Writer) (*boot, error) {
	began := time.Now()
	cmd := exec.CommandContext(ctx, machine(t.arch).Command, args...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	b := &boot{output: map[int]*bytes.Buffer{}, ends: map[int]wire.End{}}
	bye := b.collect(log, t, job, io.TeeReader(out, raw), began)
	err = cmd.Wait()
	b.took = time.Since(began)
	switch {
	case ctx.Err() != nil:
		b.faults = append(b.faults, fmt.Sprintf("stopped after %s: %v", b.took.Round(time.Second), context.Cause(ctx)))
	case err != nil:
		return nil, &emulatorError{err, strings.TrimSpace(errs.String())}
	case len(b.faults) > 0:
	case b.guest == nil:
		b.faults = append(b.faults, "the guest ended without a word")
	case !bye:
		b.faults = append(b.faults, "the guest ended before it was done")
	}
	return b, nil
}

// collect reads frames until the console closes.
func (b *boot) collect(log io.Writer, t target, job *wire.Job, r io.Reader, began time.Time) (bye bool) {
	var last uint32
	run := -1
	br := bufio.NewReaderSize(r, 256<<10)
	for {
		line, err := br.ReadString('\n')
		f, ok, bad := wire.Parse(line)
		if bad != nil {
			fmt.Fprintf(log, "%s: %v\n", t.name, bad) // the gap below is what counts
		}
		if !ok && len(b.console)+len(line) < mostConsole {
			b.console = append(b.console, line...)
		}
		if ok {
			if f.Seq != last+1 {
				b.faults = append(b.faults, fmt.Sprintf("console: frames %d to %d are lost", last+1, f.Seq-1))
			}
			last = f.Seq
			run = b.take(log, t, job, f, run, began)
			bye = bye || f.Kind == wire.KindBye
		}
		if err != nil {
			return bye
		}
	}
}

// take handles one frame and returns the number of the Run that now runs.
func (b *boot) take(log io.Writer, t target, job *wire.Job, f wire.Frame, run int, began time.Time) int {
	switch f.Kind {
	case wire.KindUp:
		g := new(wire.Guest)
		if err := json.Unmarshal([]byte(f.Text), g); err != nil {
			b.faults = append(b.faults, fmt.Sprintf("up: %v", err))
			return run
		}
		b.guest, b.upAfter = g, time.Since(began)
		fmt.Fprintf(log, "%s: %s up after %.1f s\n", t.name, g.Release, b.upAfter.Seconds())
	case wire.KindBegin:
		n, err := strconv.Atoi(f.Text)
		if err != nil || n < 0 || n >= len(job.Runs) {
			b.faults = append(b.faults, fmt.Sprintf("begin: no run %.20q", f.Text))
			return run
		}
		run = n
		b.output[run] = new(bytes.Buffer)
		fmt.Fprintf(log, "%s: running %s\n", t.name, job.Runs[run].Name)
	case wire.KindLine:
		if buf := b.output[run]; buf != nil {
			buf.WriteString(f.Text)
			if test, ok := strings.CutPrefix(f.Text, "\x16--- FAIL: "); ok {
				fmt.Fprintf(log, "%s: FAIL %s", t.name, test)
			}
		}
	case wire.KindEnd:
		var e wire.End
		if err := json.Unmarshal([]byte(f.Text), &e); err != nil {
			b.faults = append(b.faults, fmt.Sprintf("end: %v", err))
			return run
		}
		b.ends[e.Run] = e
		if e.Tainted != 0 && (b.guest == nil || b.guest.Tainted != e.Tainted) {
			b.faults = append(b.faults, fmt.Sprintf("%s: the kernel is tainted (%d): it warned or worse", job.Runs[e.Run].Name, e.Tainted))
		}
	case wire.KindKmsg:
		b.kmsg = append(b.kmsg, f.Text)
	case wire.KindFault:
		b.faults = append(b.faults, "guest: "+f.Text)
	}
	return run
}

// An emulatorError says that qemu itself failed: it was killed, or could not
// go on. A guest that panics or powers off ends it without an error.
type emulatorError struct {
	err  error
	said string
}

func (e *emulatorError) Error() string { return fmt.Sprintf("qemu: %v: %s", e.err, e.said) }
func (e *emulatorError) Unwrap() error { return e.err }

// startAgain is start, and once more if the emulator failed: that says nothing
// about the kernel or the tests. What they say is never tried again.
func startAgain(ctx context.Context, log io.Writer, t target, args []string, job *wire.Job, raw io.Writer) (*boot, error) {
	b, err := start(ctx, log, t, args, job, raw)
	var crash *emulatorError
	if errors.As(err, &crash) && ctx.Err() == nil {
		fmt.Fprintf(log, "%s: the emulator failed, once more: %v\n", t.name, err)
		return start(ctx, log, t, args, job, raw)
	}
	return b, err
}

// errTimeout is why a VM was stopped.
var errTimeout = errors.New("the time for one kernel (-timeout) is over")

// rawLog opens the file that gets everything the console said.
func rawLog(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
}
