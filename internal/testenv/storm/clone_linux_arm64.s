#include "textflag.h"

// func clone(flags uintptr) int
//
// The child must not touch the stack: it may be its maker's.
TEXT ·clone(SB), NOSPLIT, $0-16
	MOVD flags+0(FP), R0
	MOVD ZR, R1       // the maker's stack
	MOVD ZR, R2
	MOVD ZR, R3
	MOVD ZR, R4
	MOVD $220, R8     // SYS_CLONE
	SVC
	CBZ  R0, child
	MOVD R0, ret+8(FP)
	RET
child:
	MOVD ZR, R0
	MOVD $93, R8      // SYS_EXIT: this task alone
	SVC
	BRK

// func forkerCode() unsafe.Pointer
TEXT ·forkerCode(SB), NOSPLIT, $0-8
	MOVD $·forker(SB), R0
	MOVD R0, ret+0(FP)
	RET

// forker is a whole program: see clone_linux_amd64.s.
TEXT ·forker(SB), NOSPLIT|NOFRAME, $0-0
	SUB $64, RSP
again:
	MOVD ZR, R0
	MOVD RSP, R1
	MOVD $8, R2
	MOVD $63, R8      // SYS_READ
	SVC
	CBZ  R0, over
	CMP  $8, R0
	BNE  wrong
	MOVD (RSP), R19
more:
	CBZ  R19, done
	MOVD $17, R0      // SIGCHLD
	MOVD ZR, R1
	MOVD ZR, R2
	MOVD ZR, R3
	MOVD ZR, R4
	MOVD $220, R8     // SYS_CLONE
	SVC
	CBZ  R0, over     // the child
	TBNZ $63, R0, wrong
	MOVD $-1, R0
	MOVD ZR, R1
	MOVD ZR, R2
	MOVD ZR, R3
	MOVD $260, R8     // SYS_WAIT4
	SVC
	TBNZ $63, R0, wrong
	SUB  $1, R19
	B    more
done:
	MOVD $1, R0
	MOVD RSP, R1
	MOVD $8, R2
	MOVD $64, R8      // SYS_WRITE
	SVC
	CMP  $8, R0
	BNE  wrong
	B    again
over:
	MOVD ZR, R0
	MOVD $94, R8      // SYS_EXIT_GROUP
	SVC
wrong:
	MOVD $1, R0
	MOVD $94, R8
	SVC
	BRK
