#include "textflag.h"

// func clone(flags uintptr) int
//
// The child must not touch the stack: it may be its maker's.
TEXT ·clone(SB), NOSPLIT, $0-16
	MOVQ flags+0(FP), DI
	XORL SI, SI      // the maker's stack
	XORL DX, DX
	XORL R10, R10
	XORL R8, R8
	MOVL $56, AX     // SYS_CLONE
	SYSCALL
	TESTQ AX, AX
	JZ   child
	MOVQ AX, ret+8(FP)
	RET
child:
	XORL DI, DI
	MOVL $60, AX     // SYS_EXIT: this task alone
	SYSCALL
	INT $3

// func forkerCode() unsafe.Pointer
TEXT ·forkerCode(SB), NOSPLIT, $0-8
	LEAQ ·forker(SB), AX
	MOVQ AX, ret+0(FP)
	RET

// forker is a whole program, to be copied into a file: it reads a count from
// its standard input, 8 bytes, makes so many processes one after the other,
// writes the count to its standard output, and begins again. It ends with its
// input, or with status 1 at the first error.
TEXT ·forker(SB), NOSPLIT|NOFRAME, $0-0
	SUBQ $64, SP
again:
	XORL DI, DI
	MOVQ SP, SI
	MOVL $8, DX
	XORL AX, AX      // SYS_READ
	SYSCALL
	TESTQ AX, AX
	JZ   over
	CMPQ AX, $8
	JNE  wrong
	MOVQ 0(SP), R12
more:
	TESTQ R12, R12
	JZ   done
	MOVL $17, DI     // SIGCHLD
	XORL SI, SI
	XORL DX, DX
	XORL R10, R10
	XORL R8, R8
	MOVL $56, AX     // SYS_CLONE
	SYSCALL
	TESTQ AX, AX
	JZ   over        // the child
	JLT  wrong
	MOVQ $-1, DI
	XORL SI, SI
	XORL DX, DX
	XORL R10, R10
	MOVL $61, AX     // SYS_WAIT4
	SYSCALL
	TESTQ AX, AX
	JLT  wrong
	DECQ R12
	JMP  more
done:
	MOVL $1, DI
	MOVQ SP, SI
	MOVL $8, DX
	MOVL $1, AX      // SYS_WRITE
	SYSCALL
	CMPQ AX, $8
	JNE  wrong
	JMP  again
over:
	XORL DI, DI
	MOVL $231, AX    // SYS_EXIT_GROUP
	SYSCALL
wrong:
	MOVL $1, DI
	MOVL $231, AX
	SYSCALL
	INT $3
