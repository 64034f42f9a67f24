package recorder

import (
	"math/bits"
	"os"

	"github.com/cilium/ebpf/asm"

	"github.com/procession-dev/procession/internal/event"
)

// A program is the socket filter in the making: one method per group of facts,
// in the order in which run calls them. Each says which kernel structs it reads.
type program struct {
	assembler
	k        *kernel
	kinds    event.Kinds
	cwd      bool
	cgroupV1 bool
	self     int32

	ring, scratch, counters int // map descriptors
}

// The message as it lies in the datagram: struct nlmsghdr (16 bytes), then
// struct cn_msg and struct proc_event (60 bytes). It is laid on the stack, and
// later in the record, behind the 4 bytes of the record's length.
const (
	msgOff  = 16
	msgSize = headMsg - 4
	headMsg = 64 // bytes of the record's header that the message fills

	cnIdxProc = 1 // CN_IDX_PROC
	cnValProc = 1 // CN_VAL_PROC
)

// onStack is a message field's place on the stack, before there is a record.
func onStack(field int16) int16 { return slotHead + field }

// run builds the program. It returns 0 in any case: no message is ever queued.
func (p *program) run() asm.Instructions {
	p.admit()
	p.choose()
	p.header()
	p.task()
	p.when(whatAck, "send")
	p.parent()
	p.creds()
	p.process()
	p.namespaces()
	p.exit()
	p.child()
	p.tracee()
	p.cgroup()

	// The rest is about the executable. A fork's creator and a dying process
	// are known by their exec; names change too often.
	p.unless("send", whatExec, whatUID, whatGID, whatSID, whatPtrace, whatCoreDump)
	p.exeFile()
	p.exePath()
	p.unless("send", whatExec)
	p.workDir()
	p.file()
	p.args()

	p.at("send")
	p.send()
	p.forged()
	p.at("drop")
	p.emit(asm.Mov.Imm(asm.R0, 0), asm.Return())
	return p.ins
}

// admit lets only the kernel's own messages of the process connector pass, and
// looks for gaps in their numbers before anything is selected. It leaves the
// message on the stack and this CPU's counters in rPtr.
//
// Reads struct sk_buff.cb (struct netlink_skb_parms.portid: the sender's port,
// which no program can choose to be 0) and the message.
func (p *program) admit() {
	p.emit(asm.Mov.Reg(rWalk, asm.R1)) // the skb
	p.read(rStack, slotTmp, 4, rWalk, p.k.skbCB+p.k.cbPortID)
	p.emit(asm.JNE.Imm(asm.R0, 0, "forged"),
		asm.LoadMem(rTmp, rStack, slotTmp, asm.Word), asm.JNE.Imm(rTmp, 0, "forged"))
	p.emit(asm.Mov.Imm(rTmp, headSize), asm.StoreMem(rStack, slotHead, rTmp, asm.Word), // the record's length so far
		asm.Mov.Reg(asm.R1, rWalk), asm.Mov.Imm(asm.R2, msgOff), asm.Mov.Reg(asm.R3, rStack), asm.Add.Imm(asm.R3, slotHead+4), asm.Mov.Imm(asm.R4, msgSize),
		asm.FnSkbLoadBytes.Call(), asm.JNE.Imm(asm.R0, 0, "forged"),
		asm.LoadMem(rTmp, rStack, slotHead+4, asm.Word), asm.JNE.Imm(rTmp, cnIdxProc, "forged"),
		asm.LoadMem(rTmp, rStack, slotHead+8, asm.Word), asm.JNE.Imm(rTmp, cnValProc, "forged"))

	// Counters and scratch are arrays indexed by the message's CPU. The
	// connector sends under a per-CPU lock, with preemption off.
	p.emit(asm.LoadMem(rTmp, rStack, onStack(offCPU), asm.Word), asm.StoreMem(rStack, slotKey, rTmp, asm.Word))
	p.lookup(p.counters)
	p.emit(asm.Mov.Reg(rPtr, asm.R0), asm.StoreMem(rStack, slotCounter, rPtr, asm.DWord))

	// Every message of this CPU passes here, so a number left out is a message
	// that was never sent. The first one sets the base.
	p.emit(asm.LoadMem(asm.R2, rStack, onStack(offSeq), asm.Word),
		asm.LoadMem(rTmp, rPtr, ctStarted, asm.Word), asm.JEq.Imm(rTmp, 0, "in-order"),
		asm.LoadMem(rTmp, rPtr, ctNextSeq, asm.Word),
		asm.Mov.Reg32(asm.R3, asm.R2), asm.Sub.Reg32(asm.R3, rTmp), asm.JEq.Imm(asm.R3, 0, "in-order"),
		asm.LoadMem(rTmp, rPtr, ctGap, asm.DWord), asm.Add.Reg(rTmp, asm.R3), asm.StoreMem(rPtr, ctGap, rTmp, asm.DWord))
	p.at("in-order")
	p.emit(asm.Add.Imm(asm.R2, 1), asm.StoreMem(rPtr, ctNextSeq, asm.R2, asm.Word),
		asm.Mov.Imm(rTmp, 1), asm.StoreMem(rPtr, ctStarted, rTmp, asm.Word))
}

// lookup is R0 = map[slotKey]. The arrays have a value for each possible CPU.
func (p *program) lookup(fd int) {
	p.emit(asm.LoadMapPtr(asm.R1, fd), asm.Mov.Reg(asm.R2, rStack), asm.Add.Imm(asm.R2, slotKey),
		asm.FnMapLookupElem.Call(), asm.JEq.Imm(asm.R0, 0, "drop"))
}

// forged counts a message that is not the kernel's. It may name any CPU and be
// sent by several at once, so it counts on the CPU that runs it, atomically.
func (p *program) forged() {
	p.at("forged")
	p.emit(asm.FnGetSmpProcessorId.Call(), asm.StoreMem(rStack, slotKey, asm.R0, asm.Word))
	p.lookup(p.counters)
	p.emit(asm.Mov.Imm(rTmp, 1), asm.AddAtomic.Mem(asm.R0, rTmp, asm.DWord, ctForged))
}

// choose drops the kinds that nobody asked for, and the starts and ends of
// threads. What passes is counted as Seen.
func (p *program) choose() {
	what := asm.R2
	field := func(dst asm.Register, off int16) { p.emit(asm.LoadMem(dst, rStack, onStack(off), asm.Word)) }
	// when begins the case of one kind; it ends with a jump to want or drop.
	when := func(w uint32, body func()) {
		next := p.fresh("next")
		p.emit(asm.JNE.Imm32(what, int32(w), next))
		body()
		p.at(next)
	}
	field(what, offWhat)
	for _, c := range []struct {
		kind event.Kind
		what uint32
	}{
		{event.Exec, whatExec}, {event.UIDChange, whatUID}, {event.GIDChange, whatGID},
		{event.SessionChange, whatSID}, {event.CommChange, whatComm}, {event.CoreDump, whatCoreDump},
	} {
		if p.kinds.Has(c.kind) {
			p.emit(asm.JEq.Imm32(what, int32(c.what), "want"))
		}
	}
	p.emit(asm.JEq.Imm32(what, whatAck, "want"))
	if p.kinds.Has(event.Fork) {
		when(whatFork, func() {
			field(rTmp, forkChildPID)
			field(asm.R3, forkChildTGID)
			p.emit(asm.JEq.Reg(rTmp, asm.R3, "want"), asm.Ja.Label("drop"))
		})
	}
	if p.kinds.Has(event.Exit) {
		when(whatExit, func() {
			field(rTmp, dataPID)
			field(asm.R3, dataTGID)
			p.emit(asm.JEq.Reg(rTmp, asm.R3, "want"), asm.Ja.Label("drop"))
		})
	}
	if attach, detach := p.kinds.Has(event.PtraceAttach), p.kinds.Has(event.PtraceDetach); attach || detach {
		when(whatPtrace, func() {
			field(rTmp, ptraceTracerPID)
			if attach {
				p.emit(asm.JNE.Imm(rTmp, 0, "want"))
			}
			if detach {
				p.emit(asm.JEq.Imm(rTmp, 0, "want"))
			}
			p.jump("drop")
		})
	}
	if p.self != 0 && !p.kinds.Has(event.CommChange) {
		when(whatComm, func() { // a heartbeat
			field(rTmp, dataTGID)
			p.emit(asm.JEq.Imm32(rTmp, p.self, "want"), asm.Ja.Label("drop"))
		})
	}
	p.jump("drop")
	p.at("want")
	p.count(ctSeen)
}

// header starts a record: the message goes in as it is, save the first two
// words of cn_msg.id, which give way to version and flags.
func (p *program) header() {
	p.lookup(p.scratch)
	p.emit(asm.Mov.Reg(rRec, asm.R0))
	for off := int16(0); off < headMsg; off += 8 {
		p.emit(asm.LoadMem(rTmp, rStack, slotHead+off, asm.DWord), asm.StoreMem(rRec, off, rTmp, asm.DWord))
	}
	p.emit(asm.Mov.Imm(rTmp, 0))
	for off := int16(headMsg); off < headSize; off += 8 {
		p.emit(asm.StoreMem(rRec, off, rTmp, asm.DWord))
	}
	p.emit(asm.StoreMem(rRec, offFlags, rTmp, asm.Word),
		asm.Mov.Imm(rTmp, Version), asm.StoreMem(rRec, offVersion, rTmp, asm.Word))
}

// task reads who runs the program: struct task_struct of current and of its
// group leader, whose start time is the process's. It leaves current in rTask.
func (p *program) task() {
	t := &p.k.task
	if p.typed {
		p.emit(asm.FnGetCurrentTaskBtf.Call())
	} else {
		p.emit(asm.FnGetCurrentTask.Call())
	}
	p.emit(asm.Mov.Reg(rTask, asm.R0))
	p.copy(offPID, rTask, t.pid, asm.Word)
	p.copy(offTGID, rTask, t.tgid, asm.Word)
	p.follow(rPtr, rTask, t.groupLeader)
	p.copy(offStart, rPtr, t.startBoottime, asm.DWord)
}

// parent reads struct task_struct of the parent process, and what struct
// task_struct of current says besides its pointers.
func (p *program) parent() {
	t := &p.k.task
	p.follow(rPtr, rTask, t.realParent, t.groupLeader)
	p.copy(offParentStart, rPtr, t.startBoottime, asm.DWord)
	p.copy(offPPID, rPtr, t.tgid, asm.Word)

	p.readFact(flagComm, offComm, commSize, rTask, t.comm)
	p.copy(offTaskFlags, rTask, t.atomicFlags, asm.Word)
	if t.loginUID >= 0 && t.sessionID >= 0 {
		p.readFact(flagLogin, offLogin, 4, rTask, t.loginUID)
		p.copy(offAuditSession, rTask, t.sessionID, asm.Word)
	}
}

// creds reads struct cred: the task's own (real_cred), which differs from what
// it acts with for a moment only.
func (p *program) creds() {
	p.follow(rPtr, rTask, p.k.task.realCred)
	p.readFact(flagIDs, offIDs, 32, rPtr, p.k.cred.uid)
	p.readFact(flagCaps, offCaps, 16, rPtr, p.k.cred.capPermitted)
}

// process reads struct signal_struct: threads, terminal (struct tty_struct), and
// session (struct pid, as the initial pid namespace numbers it).
func (p *program) process() {
	s := &p.k.signal
	p.follow(rPtr, rTask, p.k.task.signal)
	p.copy(offThreads, rPtr, s.threads, asm.Word)
	p.load(rWalk, rPtr, s.tty, asm.DWord)
	p.emit(asm.JEq.Imm(rWalk, 0, "no-tty"))
	p.load(rTmp, rWalk, p.k.ttyIndex, asm.Word)
	p.emit(asm.Add.Imm(rTmp, 1), asm.StoreMem(rRec, offTTY, rTmp, asm.Word))
	p.at("no-tty")
	p.follow(rPtr, rPtr, s.pidSID)
	p.readFact(flagSession, offSID, 4, rPtr, p.k.pid.numbers)
}

// namespaces reads struct nsproxy, the user namespace of struct cred, and the
// process's number in the innermost pid namespace (the last of struct
// pid.numbers). A dying task has no nsproxy any more.
func (p *program) namespaces() {
	k := p.k
	p.when(whatExit, "no-ns")
	p.follow(rPtr, rTask, k.task.realCred, k.cred.userNS)
	p.copy(offNSUser, rPtr, k.nsInum.user, asm.Word)
	p.follow(rPtr, rTask, k.task.nsproxy, k.nsproxy.net)
	p.copy(offNSNet, rPtr, k.nsInum.net, asm.Word)
	p.follow(rPtr, rTask, k.task.nsproxy, k.nsproxy.mnt)
	p.copy(offNSMnt, rPtr, k.nsInum.mnt, asm.Word)

	p.follow(rPtr, rTask, k.task.signal, k.signal.pidTGID)
	p.load(asm.R3, rPtr, k.pid.level, asm.Word)
	p.emit(asm.Mul.Imm(asm.R3, upidSize), asm.Mov.Reg(rTmp, rPtr), asm.Add.Reg(asm.R3, rTmp))
	p.read(rStack, slotTmp, upidSize, asm.R3, k.pid.numbers)
	p.emit(asm.JNE.Imm(asm.R0, 0, "no-ns"),
		asm.LoadMem(rTmp, rStack, slotTmp, asm.Word), asm.StoreMem(rRec, offInnerPID, rTmp, asm.Word),
		asm.LoadMem(rPtr, rStack, slotTmp+8, asm.DWord))
	p.readFact(flagNS, offNSPID, 4, rPtr, k.nsInum.pid)
	p.at("no-ns")
}

// exit reads what a process has used: struct task_struct and struct
// signal_struct, into which the kernel adds up the threads that ended. The
// state is read last: see runTime.
func (p *program) exit() {
	p.unless("no-exit", whatExit)
	p.follow(rPtr, rTask, p.k.task.signal)
	p.load(rTmp, rPtr, p.k.signal.maxRSS, asm.DWord)
	pageShift := int32(bits.TrailingZeros(uint(os.Getpagesize())))
	p.emit(asm.LSh.Imm(rTmp, pageShift), asm.StoreMem(rRec, offMaxRSS, rTmp, asm.DWord))
	p.copy(offRunTime, rTask, p.k.task.runTime, asm.DWord)
	p.copy(offRunTimeOthers, rPtr, p.k.signal.runTime, asm.DWord)
	p.copy(offExitState, rTask, p.k.task.exitState, asm.Word)
	p.at("no-exit")
}

// child finds a new process: the last child of its real parent, which is the
// creator or, for CLONE_PARENT, the creator's parent. The message has its pid
// but not its start, which together are its identity.
func (p *program) child() {
	p.unless("no-child", whatFork)
	p.load(rPtr, rTask, p.k.task.children+listPrev, asm.DWord)
	p.peer("no-own-child", p.k.task.sibling, forkChildPID)
	p.jump("no-child")
	p.at("no-own-child")
	p.follow(rPtr, rTask, p.k.task.realParent, p.k.task.children+listPrev)
	p.peer("no-child", p.k.task.sibling, forkChildPID)
	p.at("no-child")
}

// tracee finds the process that is traced from now on: the first entry of the
// tracer's list.
func (p *program) tracee() {
	p.unless("no-tracee", whatPtrace)
	p.load(rPtr, rTask, p.k.task.ptraced, asm.DWord)
	p.peer("no-tracee", p.k.task.ptraceEntry, dataPID)
	p.at("no-tracee")
}

// peer reads struct task_struct of a task by its entry in a list, if it is the
// one the message names, and otherwise jumps.
func (p *program) peer(other string, entry int32, named int16) {
	t := &p.k.task
	p.read(rStack, slotTmp, 4, rPtr, t.pid-entry)
	p.get(rTmp, named, asm.Word)
	p.emit(asm.JNE.Imm(asm.R0, 0, other), asm.LoadMem(asm.R2, rStack, slotTmp, asm.Word), asm.JNE.Reg(rTmp, asm.R2, other),
		asm.StoreMem(rRec, offPeerPID, rTmp, asm.Word))
	p.read(rStack, slotTmp, 8, rPtr, t.groupLeader-entry)
	p.emit(asm.LoadMem(asm.R3, rStack, slotTmp, asm.DWord))
	p.readFact(flagPeer, offPeerStart, 8, asm.R3, t.startBoottime)
}

// cgroup copies the names of the task's cgroup, leaf first: struct css_set, then
// struct kernfs_node up to the one without parent, which is the root.
func (p *program) cgroup() {
	k := p.k
	p.emit(asm.StoreMem(rStack, slotTask, rTask, asm.DWord))
	if p.cgroupV1 {
		p.follow(rPtr, rTask, k.task.cgroups, k.css.memory, k.css.cgroup)
	} else {
		p.follow(rPtr, rTask, k.task.cgroups, k.css.dflCgrp)
	}
	p.read(rStack, slotTmp, 8, rPtr, k.cgroupKn) // a plain number: the loop must see one type
	p.section()
	p.emit(asm.LoadMem(rTask, rStack, slotTmp, asm.DWord), asm.Mov.Imm(rWalk, 0))
	p.at("cgroup")
	p.read(rStack, slotEntry, 16, rTask, k.kernfs.parent)
	p.emit(asm.JNE.Imm(asm.R0, 0, "cgroup-end"),
		asm.LoadMem(rTask, rStack, slotEntry, asm.DWord), asm.JEq.Imm(rTask, 0, "cgroup-top"),
		asm.JGE.Imm(rWalk, cgroupDepth, "cgroup-cut"))
	p.name(slotEntry+8, headSize+cgroupMax, "cgroup-cut", "cgroup-end")
	p.emit(asm.Add.Imm(rWalk, 1), asm.JLE.Imm(rWalk, cgroupDepth, "cgroup"))
	p.at("cgroup-cut")
	p.mark(flagCgroupCut)
	p.jump("cgroup-end")
	p.at("cgroup-top")
	p.mark(flagCgroupTop)
	p.at("cgroup-end")
	p.sectionEnd(offCgroupLen)
	p.emit(asm.LoadMem(rTask, rStack, slotTask, asm.DWord))
}

// name appends one name, with its NUL, whose pointer lies on the stack. limit is
// where the section's room ends.
func (p *program) name(slot int16, limit int32, full, unread string) {
	p.end(limit-nameMax, full)
	p.emit(asm.Mov.Reg(asm.R1, rRec), asm.Add.Reg(asm.R1, rPtr), asm.Mov.Imm(asm.R2, nameMax),
		asm.LoadMem(asm.R3, rStack, slot, asm.DWord), asm.FnProbeReadKernelStr.Call(),
		asm.JSLE.Imm(asm.R0, 0, unread))
	p.advance(asm.R0)
}

// exeFile reads the file behind struct mm_struct.exe_file: struct inode, struct
// super_block, and for overlayfs struct ovl_inode. A kernel thread has none.
func (p *program) exeFile() {
	k := p.k
	p.load(rPtr, rTask, k.task.mm, asm.DWord)
	p.emit(asm.JEq.Imm(rPtr, 0, "send"))
	p.follow(rPtr, rPtr, k.mm.exeFile)
	p.emit(asm.JEq.Imm(rPtr, 0, "send"), asm.StoreMem(rStack, slotFile, rPtr, asm.DWord))
	p.follow(rPtr, rPtr, k.file.inode)
	p.emit(asm.StoreMem(rStack, slotInode, rPtr, asm.DWord))
	p.copy(offExeIno, rPtr, k.inode.ino, asm.DWord)
	p.copy(offExeMode, rPtr, k.inode.mode, asm.Half)
	p.copy(offExeNlink, rPtr, k.inode.nlink, asm.Word)
	p.readFact(flagExeFile, offExeOwner, 8, rPtr, k.inode.uid)
	p.follow(rPtr, rPtr, k.inode.sb)
	p.copy(offExeDev, rPtr, k.super.dev, asm.Word)
	p.copy(offExeMagic, rPtr, k.super.magic, asm.DWord)

	if !k.overlayKnown {
		return
	}
	const overlayMagic = 0x794c7630 // OVERLAYFS_SUPER_MAGIC
	p.get(rTmp, offExeMagic, asm.DWord)
	p.emit(asm.JNE.Imm(rTmp, overlayMagic, "upper-end"), asm.LoadMem(rPtr, rStack, slotInode, asm.DWord))
	p.read(rStack, slotTmp, 8, rPtr, k.overlayUpper)
	p.emit(asm.JNE.Imm(asm.R0, 0, "upper-end"))
	p.mark(flagUpperKnown)
	p.emit(asm.LoadMem(rTmp, rStack, slotTmp, asm.DWord), asm.JEq.Imm(rTmp, 0, "upper-end"))
	p.mark(flagUpper)
	p.at("upper-end")
}

// exePath walks from the executable to the top of its mount namespace, and
// reads which namespace that is (struct mount.mnt_ns of the topmost mount).
// struct fs_struct has the task's root directory.
func (p *program) exePath() {
	k := p.k
	p.follow(rPtr, rTask, k.task.fs)
	p.read(rStack, slotRoot, 16, rPtr, k.fs.root)
	p.emit(asm.LoadMem(rTmp, rStack, slotRoot, asm.DWord), asm.Sub.Imm(rTmp, k.mount.vfs), asm.StoreMem(rStack, slotRoot, rTmp, asm.DWord))
	p.emit(asm.LoadMem(rPtr, rStack, slotFile, asm.DWord))
	p.read(rStack, slotPath, 16, rPtr, k.file.path)
	p.section()
	p.walk(exeShift, headSize+cgroupMax+exeMax, true)
	p.sectionEnd(offExeLen)
	p.emit(asm.LoadMem(rPtr, rStack, slotMount, asm.DWord))
	p.read(rStack, slotTmp, 8, rPtr, k.mount.ns)
	p.emit(asm.JNE.Imm(asm.R0, 0, "exe-ns-end"))
	p.mark(flagExeNS)
	p.emit(asm.LoadMem(rPtr, rStack, slotTmp, asm.DWord), asm.JEq.Imm(rPtr, 0, "exe-ns-end"))
	p.read(rRec, offExeNS, 4, rPtr, k.nsInum.mnt)
	p.at("exe-ns-end")
	p.emit(asm.LoadMem(rTask, rStack, slotTask, asm.DWord))
}

// workDir walks from the working directory up: struct fs_struct.
func (p *program) workDir() {
	if !p.cwd {
		return
	}
	p.follow(rPtr, rTask, p.k.task.fs)
	p.read(rStack, slotPath, 16, rPtr, p.k.fs.pwd)
	p.section()
	p.walk(cwdShift, headSize+cgroupMax+exeMax+cwdMax, false)
	p.sectionEnd(offCwdLen)
	p.emit(asm.LoadMem(rTask, rStack, slotTask, asm.DWord))
}

// walk goes from slotPath upwards as the kernel's own prepend_path does
// (fs/d_path.c), through struct dentry and struct mount, and appends each name.
// It leaves the last mount in slotMount, and loses rTask.
//
// All pointers in the loop are plain numbers, read by probe_read: a mount
// found by subtracting from a struct vfsmount has no type, and a typed pointer
// and a number may not meet at the head of a loop.
func (p *program) walk(shift int, limit int32, root bool) {
	k := p.k
	entry := rTask
	loop, name, next := p.fresh("walk"), p.fresh("name"), p.fresh("next")
	top, pseudo, cut, end := p.fresh("top"), p.fresh("pseudo"), p.fresh("cut"), p.fresh("end")

	p.emit(asm.LoadMem(asm.R3, rStack, slotPath, asm.DWord), asm.Sub.Imm(asm.R3, k.mount.vfs), asm.StoreMem(rStack, slotMount, asm.R3, asm.DWord))
	p.read(rStack, slotUp, 24, asm.R3, k.mount.parent)
	p.emit(asm.JNE.Imm(asm.R0, 0, end),
		asm.LoadMem(entry, rStack, slotPath+8, asm.DWord))
	// Deleted is what is in no directory, but for the root of a file system.
	hashed := p.fresh("hashed")
	p.read(rStack, slotTmp, 8, entry, k.dentry.hashed)
	p.emit(asm.JNE.Imm(asm.R0, 0, end), asm.LoadMem(rTmp, rStack, slotTmp, asm.DWord), asm.JNE.Imm(rTmp, 0, hashed))
	p.read(rStack, slotTmp, 8, entry, k.dentry.parent)
	p.emit(asm.JNE.Imm(asm.R0, 0, end), asm.LoadMem(rTmp, rStack, slotTmp, asm.DWord), asm.JEq.Reg(rTmp, entry, hashed))
	p.mark(pathUnhash << shift)
	p.at(hashed)
	p.emit(asm.Mov.Imm(rWalk, 0))

	p.at(loop)
	if root {
		notRoot := p.fresh("not-root")
		p.emit(asm.LoadMem(rTmp, rStack, slotRoot+8, asm.DWord), asm.JNE.Reg(rTmp, entry, notRoot),
			asm.LoadMem(rTmp, rStack, slotRoot, asm.DWord), asm.LoadMem(asm.R2, rStack, slotMount, asm.DWord), asm.JNE.Reg(rTmp, asm.R2, notRoot))
		p.mark(pathRoot << shift)
		p.at(notRoot)
	}
	// The root of a mount: go on where it is mounted, if it is.
	p.emit(asm.LoadMem(rTmp, rStack, slotUp+16, asm.DWord), asm.JNE.Reg(rTmp, entry, name),
		asm.LoadMem(asm.R3, rStack, slotUp, asm.DWord), asm.LoadMem(asm.R2, rStack, slotMount, asm.DWord), asm.JEq.Reg(asm.R3, asm.R2, top),
		asm.StoreMem(rStack, slotMount, asm.R3, asm.DWord), asm.LoadMem(entry, rStack, slotUp+8, asm.DWord))
	p.read(rStack, slotUp, 24, asm.R3, k.mount.parent)
	p.emit(asm.JNE.Imm(asm.R0, 0, end), asm.Ja.Label(next))

	p.at(name)
	p.read(rStack, slotEntry, dentrySpan, entry, k.dentry.parent)
	p.emit(asm.JNE.Imm(asm.R0, 0, end))
	p.name(slotEntry+int16(k.dentry.name), limit, cut, end)
	p.emit(asm.LoadMem(rTmp, rStack, slotEntry, asm.DWord), asm.JEq.Reg(rTmp, entry, pseudo),
		asm.Mov.Reg(entry, rTmp))
	p.at(next)
	p.emit(asm.Add.Imm(rWalk, 1), asm.JLT.Imm(rWalk, pathDepth, loop))

	p.at(cut)
	p.mark(pathCut << shift)
	p.jump(end)
	p.at(pseudo)
	p.mark(pathPseudo << shift)
	p.jump(end)
	p.at(top)
	p.mark(pathTop << shift)
	p.at(end)
}

// file copies the name that was handed to execve: the kernel puts it behind the
// environment (struct mm_struct.env_end). For a script it is the script's path.
func (p *program) file() {
	k := p.k
	p.follow(rPtr, rTask, k.task.mm)
	p.load(rTmp, rPtr, k.mm.argStart, asm.DWord)
	p.emit(asm.StoreMem(rStack, slotArgs, rTmp, asm.DWord))
	p.load(rTmp, rPtr, k.mm.argEnd, asm.DWord)
	p.emit(asm.StoreMem(rStack, slotTmp, rTmp, asm.DWord))
	p.load(rTmp, rPtr, k.mm.envEnd, asm.DWord)
	p.emit(asm.StoreMem(rStack, slotEnvEnd, rTmp, asm.DWord))

	p.end(headSize+cgroupMax+exeMax+cwdMax, "no-file")
	p.emit(asm.Mov.Reg(asm.R1, rRec), asm.Add.Reg(asm.R1, rPtr), asm.Mov.Imm(asm.R2, fileMax),
		asm.LoadMem(asm.R3, rStack, slotEnvEnd, asm.DWord), asm.FnProbeReadUserStr.Call(),
		asm.JSLE.Imm(asm.R0, 0, "no-file"), asm.StoreMem(rRec, offFileLen, asm.R0, asm.Word))
	p.advance(asm.R0)
	p.mark(flagFile)
	p.at("no-file")
}

// args copies the beginning of argv from the task's memory, between arg_start
// and arg_end as file has left them. They have just been written there by the
// kernel itself, so the pages are present.
func (p *program) args() {
	p.end(headSize+cgroupMax+exeMax+cwdMax+fileMax, "send")
	p.emit(asm.LoadMem(asm.R3, rStack, slotArgs, asm.DWord), asm.LoadMem(asm.R2, rStack, slotTmp, asm.DWord), asm.Sub.Reg(asm.R2, asm.R3),
		asm.StoreMem(rRec, offArgsTotal, asm.R2, asm.Word),
		asm.JLE.Imm(asm.R2, argsMax, "args-fit"), asm.Mov.Imm(asm.R2, argsMax))
	p.at("args-fit")
	p.emit(asm.StoreMem(rStack, slotArgs, asm.R2, asm.DWord), asm.Mov.Reg(asm.R1, rRec), asm.Add.Reg(asm.R1, rPtr),
		asm.FnProbeReadUser.Call(), asm.JNE.Imm(asm.R0, 0, "send"),
		asm.LoadMem(asm.R2, rStack, slotArgs, asm.DWord), asm.StoreMem(rRec, offArgsLen, asm.R2, asm.Word))
	p.advance(asm.R2)
	p.mark(flagArgs)
}

// send copies the record into the ring and counts it as Recorded, or as Lost if
// there is no room. The ring wakes its reader only if he had read everything
// before this record; while he is behind, or asleep by his own clock, nobody is
// woken.
func (p *program) send() {
	p.end(MaxRecord, "drop")
	p.emit(asm.LoadMapPtr(asm.R1, p.ring), asm.Mov.Reg(asm.R2, rRec), asm.Mov.Reg(asm.R3, rPtr), asm.Mov.Imm(asm.R4, 0),
		asm.FnRingbufOutput.Call(),
		asm.LoadMem(rPtr, rStack, slotCounter, asm.DWord), asm.JEq.Imm(asm.R0, 0, "recorded"))
	p.count(ctLost)
	p.jump("drop")
	p.at("recorded")
	p.count(ctRecorded)
	p.jump("drop")
}
