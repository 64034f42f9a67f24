#include "textflag.h"

// func makerCode() unsafe.Pointer
TEXT ·makerCode(SB), NOSPLIT, $0-8
	LEAQ ·maker(SB), AX
	MOVQ AX, ret+0(FP)
	RET

// maker is a whole program, to be copied into a file: see maker_linux.go. It
// uses no stack. R12 is how many tasks are to be made, R13 clone's flags, R14
// is not 0 if each is to change its session and ids, R15 is the last one.
TEXT ·maker(SB), NOSPLIT|NOFRAME, $0-0
	MOVL $15, DI               // PR_SET_NAME
	MOVL $0x100007e0, SI       // makerBase + makerName
	MOVL $157, AX              // SYS_PRCTL
	SYSCALL
	TESTQ AX, AX
	JLT  wrong
	MOVL $0x10000800, BX       // makerBase + makerData: zeros
	MOVQ $1, 0(BX)             // SIG_IGN
	MOVL $17, DI               // SIGCHLD
	MOVQ BX, SI
	XORL DX, DX
	MOVL $8, R10
	MOVL $13, AX               // SYS_RT_SIGACTION
	SYSCALL
	TESTQ AX, AX
	JLT  wrong
	MOVL $0x10010000, DI       // what lies above this program; if it must stay, forks take longer
	MOVQ $0x7fffeffef000, SI   // TASK_SIZE without it
	MOVL $11, AX               // SYS_MUNMAP
	SYSCALL
again:
	XORL DI, DI
	MOVQ BX, SI
	MOVL $24, DX
	XORL AX, AX                // SYS_READ
	SYSCALL
	TESTQ AX, AX
	JZ   over
	CMPQ AX, $24
	JNE  wrong
	MOVQ 0(BX), R12
	MOVQ 8(BX), R13
	MOVQ 16(BX), R14
more:
	TESTQ R12, R12
	JZ   made
	MOVQ R13, DI
	XORL SI, SI
	XORL DX, DX
	XORL R10, R10
	XORL R8, R8
	MOVL $56, AX               // SYS_CLONE
	SYSCALL
	TESTQ AX, AX
	JZ   task
	JLT  none
	MOVQ AX, R15
	DECQ R12
	JMP  more
none:
	BTQ  $16, R13              // CLONE_THREAD
	JCC  wrong
	CMPQ AX, $-11              // EAGAIN: too many at once, and nobody can wait for a thread of this kind
	JNE  wrong
	MOVL $24, AX               // SYS_SCHED_YIELD
	SYSCALL
	JMP  more
made:
	BTQ  $16, R13
	JCS  tell
	MOVQ R15, DI
	XORL SI, SI
	XORL DX, DX
	XORL R10, R10
	MOVL $61, AX               // SYS_WAIT4
	SYSCALL
	TESTQ AX, AX
	JGE  tell
	CMPQ AX, $-10              // ECHILD: it has ended
	JNE  wrong
tell:
	MOVL $1, DI
	MOVQ BX, SI
	MOVL $8, DX
	MOVL $1, AX                // SYS_WRITE
	SYSCALL
	CMPQ AX, $8
	JNE  wrong
	JMP  again
over:
	MOVL $15, DI               // PR_SET_NAME: none, so that its own end is not taken for a task's
	LEAQ 24(BX), SI
	MOVL $157, AX              // SYS_PRCTL
	SYSCALL
rest:
	MOVQ $-1, DI               // all others
	XORL SI, SI
	XORL DX, DX
	XORL R10, R10
	MOVL $61, AX               // SYS_WAIT4
	SYSCALL
	TESTQ AX, AX
	JGE  rest
	CMPQ AX, $-10
	JNE  wrong
	XORL AX, AX
wrong:
	NEGQ AX
	MOVQ AX, DI                // the error's number
	MOVL $60, AX               // SYS_EXIT: this task alone
	SYSCALL
task:
	TESTQ R14, R14
	JZ   end
	MOVL $112, AX              // SYS_SETSID
	SYSCALL
	TESTQ AX, AX
	JLT  bad
	MOVL $65534, DI
	MOVL $65534, SI
	MOVL $65534, DX
	MOVL $119, AX              // SYS_SETRESGID
	SYSCALL
	TESTQ AX, AX
	JNE  bad
	MOVL $117, AX              // SYS_SETRESUID
	SYSCALL
	TESTQ AX, AX
	JNE  bad
end:
	XORL DI, DI
	MOVL $60, AX               // SYS_EXIT
	SYSCALL
bad:
	MOVL $110, AX              // SYS_GETPPID
	SYSCALL
	MOVQ AX, DI
	MOVL $6, SI                // SIGABRT
	MOVL $62, AX               // SYS_KILL
	SYSCALL
	JMP  end
