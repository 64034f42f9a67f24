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

// forkerCode is where the program forker lies in this process.
func forkerCode() unsafe.Pointer

// forkerSize is enough for the code of forker on each architecture.
const forkerSize = 512

// forkerFile makes an executable file of forker: an ELF header, one program
// header, and the code (elf(5)).
func forkerFile() (*os.File, error) {
	const base, head = 0x10000000, 64 + 56
	machine := map[string]uint16{"amd64": 62, "arm64": 183}[runtime.GOARCH] // EM_X86_64, EM_AARCH64
	le := binary.LittleEndian
	b := make([]byte, head, head+forkerSize)
	copy(b, "\x7fELF\x02\x01\x01") // 64 bits, little-endian, version 1
	le.PutUint16(b[16:], 2)        // e_type: ET_EXEC
	le.PutUint16(b[18:], machine)
	le.PutUint32(b[20:], 1)         // e_version
	le.PutUint64(b[24:], base+head) // e_entry
	le.PutUint64(b[32:], 64)        // e_phoff
	le.PutUint16(b[52:], 64)        // e_ehsize
	le.PutUint16(b[54:], 56)        // e_phentsize
	le.PutUint16(b[56:], 1)         // e_phnum
	p := b[64:]
	le.PutUint32(p, 1)     // p_type: PT_LOAD
	le.PutUint32(p[4:], 5) // p_flags: read, execute
	le.PutUint64(p[16:], base)
	le.PutUint64(p[24:], base)
	le.PutUint64(p[32:], head+forkerSize) // p_filesz
	le.PutUint64(p[40:], head+forkerSize) // p_memsz
	le.PutUint64(p[48:], 0x10000)         // p_align
	b = append(b, unsafe.Slice((*byte)(forkerCode()), forkerSize)...)

	fd, err := unix.MemfdCreate("forker", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("storm: make a file in memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "forker")
	if _, err := f.Write(b); err != nil {
		f.Close()
		return nil, fmt.Errorf("storm: write the program: %w", err)
	}
	return f, nil
}

// A forker is a running process that forks.
type forker struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out io.ReadCloser
}

func startForker() (*forker, error) {
	f, err := forkerFile()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	k := &forker{cmd: &exec.Cmd{Path: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()), Args: []string{"forker"}}}
	if k.in, err = k.cmd.StdinPipe(); err == nil {
		k.out, err = k.cmd.StdoutPipe()
	}
	if err == nil {
		err = k.cmd.Start()
	}
	if err != nil {
		return nil, fmt.Errorf("storm: start the program: %w", err)
	}
	return k, nil
}

// make makes n processes, one after the other.
func (k *forker) make(n int64) error {
	var b [8]byte
	binary.NativeEndian.PutUint64(b[:], uint64(n))
	if _, err := k.in.Write(b[:]); err != nil {
		return fmt.Errorf("storm: fork: %w", err)
	}
	if _, err := io.ReadFull(k.out, b[:]); err != nil {
		return fmt.Errorf("storm: fork: %w", err)
	}
	return nil
}

func (k *forker) end() error {
	k.in.Close()
	if err := k.cmd.Wait(); err != nil {
		return fmt.Errorf("storm: fork: %w", err)
	}
	return nil
}
