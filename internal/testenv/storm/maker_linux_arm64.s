#include "textflag.h"

// func makerCode() unsafe.Pointer
TEXT ·makerCode(SB), NOSPLIT, $0-8
	MOVD $·maker(SB), R0
	MOVD R0, ret+0(FP)
	RET

// maker is a whole program: see maker_linux_amd64.s. R19 is how many tasks are
// to be made, R20 clone's flags, R21 is not 0 if each is to change its session
// and ids, R22 is the last one. Constants are made piece by piece: a pool of
// them would not be copied.
TEXT ·maker(SB), NOSPLIT|NOFRAME, $0-0
	MOVD $15, R0               // PR_SET_NAME
	MOVZ $(0x1000<<16), R1
	MOVK $0x07e0, R1           // makerBase + makerName
	MOVD $167, R8              // SYS_PRCTL
	SVC
	TBNZ $63, R0, wrong
	MOVZ $(0x1000<<16), R23
	MOVK $0x0800, R23          // makerBase + makerData: zeros
	MOVD $1, R0                // SIG_IGN
	MOVD R0, (R23)
	MOVD $17, R0               // SIGCHLD
	MOVD R23, R1
	MOVD ZR, R2
	MOVD $8, R3
	MOVD $134, R8              // SYS_RT_SIGACTION
	SVC
	TBNZ $63, R0, wrong
	MOVZ $(0x10<<32), R24      // 2^36, the smallest address space, to 2^52
	MOVZ $(0x1001<<16), R25    // what lies above this program; if it must stay, forks take longer
unmap:
	MOVD R25, R0
	SUB  R25, R24, R1
	MOVD $215, R8              // SYS_MUNMAP
	SVC
	LSL  $1, R24
	TBZ  $53, R24, unmap       // beyond the address space it does nothing
again:
	MOVD ZR, R0
	MOVD R23, R1
	MOVD $24, R2
	MOVD $63, R8               // SYS_READ
	SVC
	CBZ  R0, over
	CMP  $24, R0
	BNE  wrong
	MOVD (R23), R19
	MOVD 8(R23), R20
	MOVD 16(R23), R21
more:
	CBZ  R19, made
	MOVD R20, R0
	MOVD ZR, R1
	MOVD ZR, R2
	MOVD ZR, R3
	MOVD ZR, R4
	MOVD $220, R8              // SYS_CLONE
	SVC
	CBZ  R0, task
	TBNZ $63, R0, none
	MOVD R0, R22
	SUB  $1, R19
	B    more
none:
	TBZ  $16, R20, wrong       // CLONE_THREAD
	CMN  $11, R0               // EAGAIN: too many at once
	BNE  wrong
	MOVD $124, R8              // SYS_SCHED_YIELD
	SVC
	B    more
made:
	TBNZ $16, R20, tell
	MOVD R22, R0
	MOVD ZR, R1
	MOVD ZR, R2
	MOVD ZR, R3
	MOVD $260, R8              // SYS_WAIT4
	SVC
	TBZ  $63, R0, tell
	CMN  $10, R0               // ECHILD: it has ended
	BNE  wrong
tell:
	MOVD $1, R0
	MOVD R23, R1
	MOVD $8, R2
	MOVD $64, R8               // SYS_WRITE
	SVC
	CMP  $8, R0
	BNE  wrong
	B    again
over:
	MOVD $15, R0               // PR_SET_NAME: none, so that its own end is not taken for a task's
	ADD  $24, R23, R1
	MOVD $167, R8              // SYS_PRCTL
	SVC
rest:
	MOVD $-1, R0               // all others
	MOVD ZR, R1
	MOVD ZR, R2
	MOVD ZR, R3
	MOVD $260, R8              // SYS_WAIT4
	SVC
	TBZ  $63, R0, rest
	CMN  $10, R0
	BNE  wrong
	MOVD ZR, R0
wrong:
	NEG  R0, R0                // the error's number
	MOVD $93, R8               // SYS_EXIT: this task alone
	SVC
task:
	CBZ  R21, end
	MOVD $157, R8              // SYS_SETSID
	SVC
	TBNZ $63, R0, bad
	MOVD $65534, R0
	MOVD $65534, R1
	MOVD $65534, R2
	MOVD $149, R8              // SYS_SETRESGID
	SVC
	CBNZ R0, bad
	MOVD $65534, R0
	MOVD $147, R8              // SYS_SETRESUID
	SVC
	CBNZ R0, bad
end:
	MOVD ZR, R0
	MOVD $93, R8               // SYS_EXIT
	SVC
bad:
	MOVD $173, R8              // SYS_GETPPID
	SVC
	MOVD $6, R1                // SIGABRT
	MOVD $129, R8              // SYS_KILL
	SVC
	B    end
