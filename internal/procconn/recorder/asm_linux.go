package recorder

import (
	"strconv"

	"github.com/cilium/ebpf/asm"
)

// Registers. The kernel's calling rules: R0 is a call's result, R1 to R5 are its
// arguments and lost by it, R6 to R9 survive it, R10 is the end of the stack.
const (
	rTmp   = asm.R1  // anything short-lived
	rWalk  = asm.R6  // the skb at first; then a loop's counter
	rTask  = asm.R7  // current; during a walk the directory entry
	rRec   = asm.R8  // the record being written
	rPtr   = asm.R9  // the kernel struct being looked at; an offset in the record
	rStack = asm.R10 // read-only
)

// Stack slots, as offsets from R10.
const (
	slotHead    = -64  // first 64 bytes of the record: length, then the message from cn_msg.id on
	slotKey     = -72  // map key
	slotCounter = -80  // counters of this CPU
	slotTask    = -88  // current, during a walk
	slotSection = -96  // where the section being written begins
	slotMount   = -104 // struct mount that the walk is in
	slotPath    = -120 // struct path where the walk begins
	slotRoot    = -136 // struct path of the task's root directory
	slotUp      = -160 // {mnt_parent, mnt_mountpoint, mnt_root} of slotMount
	slotEntry   = -184 // dentrySpan bytes of a directory entry; {parent, name} of a cgroup
	slotFile    = -192 // struct file of the executable
	slotInode   = -200 // its inode
	slotArgs    = -208 // start of argv, then the bytes to copy
	slotEnvEnd  = -216 // where the file name begins
	slotLoad    = -224 // landing place of load without typed pointers
	slotTmp     = -240 // 16 bytes for whoever needs them
)

// An assembler collects instructions. Its methods are the program's vocabulary.
type assembler struct {
	ins    asm.Instructions
	label  string // to be put on the next instruction
	labels int

	// typed: the kernel knows the type of the pointers that the program
	// follows, and lets it load through them; a fault gives 0. Otherwise each
	// load is a call of bpf_probe_read_kernel.
	typed bool
}

func (a *assembler) emit(ins ...asm.Instruction) {
	if a.label != "" {
		ins[0] = ins[0].WithSymbol(a.label)
		a.label = ""
	}
	a.ins = append(a.ins, ins...)
}

// at puts a label here.
func (a *assembler) at(label string) {
	if a.label != "" { // one instruction cannot have two
		a.emit(asm.Mov.Reg(asm.R0, asm.R0))
	}
	a.label = label
}

// fresh makes a label that is used nowhere else.
func (a *assembler) fresh(name string) string {
	a.labels++
	return name + "." + strconv.Itoa(a.labels)
}

func (a *assembler) jump(label string) { a.emit(asm.Ja.Label(label)) }

// load is dst = *(src + off), src being a kernel pointer. R1 to R5 are lost,
// save dst: keep what is needed in R6 to R9 or on the stack.
func (a *assembler) load(dst, src asm.Register, off int32, size asm.Size) {
	if a.typed {
		a.emit(asm.LoadMem(dst, src, int16(off), size))
		return
	}
	a.read(rStack, slotLoad, int32(size.Sizeof()), src, off) // zeroes on a fault
	a.emit(asm.LoadMem(dst, rStack, slotLoad, size))
}

// follow loads a chain of pointers: dst = src->a->b.
func (a *assembler) follow(dst, src asm.Register, offs ...int32) {
	for _, off := range offs {
		a.load(dst, src, off, asm.DWord)
		src = dst
	}
}

// copy loads a number from the kernel and stores it in the record.
func (a *assembler) copy(field int16, src asm.Register, off int32, size asm.Size) {
	a.load(rTmp, src, off, size)
	if size == asm.Half {
		size = asm.Word // a load clears the upper bytes
	}
	a.emit(asm.StoreMem(rRec, field, rTmp, size))
}

// read copies n bytes from src + off to base + to. R0 is 0 if that went well;
// otherwise the bytes are zeroed. Pointers read so are plain numbers to the
// kernel, which loops need: see walk.
func (a *assembler) read(base asm.Register, to, n int32, src asm.Register, off int32) {
	a.emit(asm.Mov.Reg(asm.R3, src))
	if off != 0 {
		a.emit(asm.Add.Imm(asm.R3, off))
	}
	a.emit(asm.Mov.Reg(asm.R1, base), asm.Add.Imm(asm.R1, to), asm.Mov.Imm(asm.R2, n), asm.FnProbeReadKernel.Call())
}

// readFact reads n bytes into the record and says so with a flag.
func (a *assembler) readFact(flag, field, n int32, src asm.Register, off int32) {
	skip := a.fresh("unread")
	a.read(rRec, field, n, src, off)
	a.emit(asm.JNE.Imm(asm.R0, 0, skip))
	a.mark(flag)
	a.at(skip)
}

// mark sets flags in the record.
func (a *assembler) mark(flags int32) {
	a.emit(asm.LoadMem(rTmp, rRec, offFlags, asm.Word), asm.Or.Imm(rTmp, flags), asm.StoreMem(rRec, offFlags, rTmp, asm.Word))
}

// get loads a field of the record's header.
func (a *assembler) get(dst asm.Register, field int16, size asm.Size) {
	a.emit(asm.LoadMem(dst, rRec, field, size))
}

// unless jumps to label if the message is none of the given kinds.
func (a *assembler) unless(label string, whats ...uint32) {
	a.get(rTmp, offWhat, asm.Word)
	yes := a.fresh("kind")
	for _, w := range whats {
		a.emit(asm.JEq.Imm32(rTmp, int32(w), yes))
	}
	a.jump(label)
	a.at(yes)
}

// when jumps to label if the message is of the given kind.
func (a *assembler) when(what uint32, label string) {
	a.get(rTmp, offWhat, asm.Word)
	a.emit(asm.JEq.Imm32(rTmp, int32(what), label))
}

// The write offset is kept in the record's own len field, not in a register, and
// is checked each time it is loaded: so the verifier sees one state per turn of
// a loop instead of one per possible offset.

// end loads the write offset into rPtr, or jumps to full if it is above limit.
func (a *assembler) end(limit int32, full string) {
	a.emit(asm.LoadMem(rPtr, rRec, offLen, asm.Word), asm.JGT.Imm(rPtr, limit, full))
}

// advance moves the write offset in rPtr by n and stores it.
func (a *assembler) advance(n asm.Register) {
	a.emit(asm.Add.Reg(rPtr, n), asm.StoreMem(rRec, offLen, rPtr, asm.Word))
}

// section begins a text section.
func (a *assembler) section() {
	a.get(rTmp, offLen, asm.Word)
	a.emit(asm.StoreMem(rStack, slotSection, rTmp, asm.DWord))
}

// sectionEnd stores the section's length.
func (a *assembler) sectionEnd(field int16) {
	a.get(rTmp, offLen, asm.Word)
	a.emit(asm.LoadMem(asm.R2, rStack, slotSection, asm.DWord), asm.Sub.Reg(rTmp, asm.R2), asm.StoreMem(rRec, field, rTmp, asm.Word))
}

// count adds 1 to one of this CPU's counters, which rPtr points to. The connector
// holds a per-CPU lock while it sends, so nobody else counts there.
func (a *assembler) count(counter int16) {
	a.emit(asm.LoadMem(rTmp, rPtr, counter, asm.DWord), asm.Add.Imm(rTmp, 1), asm.StoreMem(rPtr, counter, rTmp, asm.DWord))
}
