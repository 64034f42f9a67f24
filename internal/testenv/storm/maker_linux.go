package storm

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// makerCode is where the program maker lies in this process.
//
// It reads orders from its standard input: how many tasks, clone's flags,
// whether each changes its session and ids, 8 bytes each. It makes them, of
// processes it waits for the last, and it writes 8 bytes to its standard output.
// At the end of its input it waits for all and ends; at an error it ends with the
// error's number. A process that cannot change its ids kills it.
func makerCode() unsafe.Pointer

// Name is what the tasks are called that a process asked for, and their makers
// until these end.
func Name(pid int) string { return fmt.Sprint("storm-", pid) }

// Where maker lies and what it needs, known to it too.
const (
	makerBase = 0x10000000 // address
	makerSize = 512        // enough for the code on each architecture
	makerName = 0x7e0      // Name, from the base
	makerData = 0x800      // zeros to begin with
	makerEnd  = 0x1000
)

// makerFile makes an executable file of maker: an ELF header, one program
// header, and the code (elf(5)). It can be written to because fork copies what
// leads to memory of its own, and leaves each child to find what lies in a file.
func makerFile() (*os.File, error) {
	const head = 64 + 56
	machine := map[string]uint16{"amd64": 62, "arm64": 183}[runtime.GOARCH] // EM_X86_64, EM_AARCH64
	le := binary.LittleEndian
	b := make([]byte, head, makerData)
	copy(b, "\x7fELF\x02\x01\x01") // 64 bits, little-endian, version 1
	le.PutUint16(b[16:], 2)        // e_type: ET_EXEC
	le.PutUint16(b[18:], machine)
	le.PutUint32(b[20:], 1)              // e_version
	le.PutUint64(b[24:], makerBase+head) // e_entry
	le.PutUint64(b[32:], 64)             // e_phoff
	le.PutUint16(b[52:], 64)             // e_ehsize
	le.PutUint16(b[54:], 56)             // e_phentsize
	le.PutUint16(b[56:], 1)              // e_phnum
	p := b[64:]
	le.PutUint32(p, 1)     // p_type: PT_LOAD
	le.PutUint32(p[4:], 7) // p_flags: read, write, execute
	le.PutUint64(p[16:], makerBase)
	le.PutUint64(p[24:], makerBase)
	le.PutUint64(p[32:], makerData) // p_filesz
	le.PutUint64(p[40:], makerEnd)  // p_memsz
	le.PutUint64(p[48:], 0x10000)   // p_align
	b = append(b, unsafe.Slice((*byte)(makerCode()), makerSize)...)
	b = append(b, make([]byte, makerData-len(b))...)
	copy(b[makerName:], Name(os.Getpid()))

	fd, err := unix.MemfdCreate("maker", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("storm: make a file in memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "maker")
	if _, err := f.Write(b); err != nil {
		f.Close()
		return nil, fmt.Errorf("storm: write the program: %w", err)
	}
	return f, nil
}

// A maker is a running process that makes tasks.
type maker struct {
	kind Kind
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  io.ReadCloser
}

// startMaker starts one on a CPU.
func startMaker(k Kind, cpu int) (*maker, error) {
	f, err := makerFile()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	m := &maker{kind: k, cmd: &exec.Cmd{Path: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()), Args: []string{"maker"}}}
	if m.in, err = m.cmd.StdinPipe(); err == nil {
		m.out, err = m.cmd.StdoutPipe()
	}
	if err == nil {
		err = m.cmd.Start()
	}
	if err != nil {
		return nil, fmt.Errorf("storm: start the program: %w", err)
	}
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(m.cmd.Process.Pid, &set); err != nil {
		m.end()
		return nil, fmt.Errorf("storm: put the program on CPU %d: %w", cpu, err)
	}
	return m, nil
}

// make makes n tasks, one after the other.
func (m *maker) make(n int64) error {
	how := ways[m.kind]
	var b []byte
	for _, v := range []uint64{uint64(n), how.flags, how.ids} {
		b = binary.NativeEndian.AppendUint64(b, v)
	}
	if _, err := m.in.Write(b); err != nil {
		return fmt.Errorf("storm: %s: %w", m.kind, err)
	}
	if _, err := io.ReadFull(m.out, b[:8]); err != nil {
		return fmt.Errorf("storm: %s: %w", m.kind, err)
	}
	return nil
}

// end waits until all tasks have ended.
func (m *maker) end() error {
	m.in.Close()
	if err := m.cmd.Wait(); err != nil {
		return fmt.Errorf("storm: %s: %w", m.kind, err)
	}
	return nil
}
