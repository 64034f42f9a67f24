// A program for the tests, without libc so that it starts in microseconds and
// runs in any root directory. Its arguments are a list of operations:
//
//   r            read one byte from standard input
//   w            read standard input to its end, then exit 0 (what follows is ignored)
//   x PATH ARGV  execve
//   f FD ARGV    execveat of a descriptor
//   u            setresgid(2000, 2001, 2002), setresuid(1000, 1001, 1002)
//   s            setsid
//   c            make a child with CLONE_PARENT; it exits 7
//   p            make a child that sleeps, and trace it with PTRACE_SEIZE
//   m NAME       rename itself (PR_SET_NAME)
//   b N          count to N million
//   k            count forever
//   a            abort: die of SIGABRT
//   e N          exit N
//   n N PATH     fork and execve PATH N times, with arguments "tiny", "tag-<i>"
//   d N P Q      fork and execve P N times, with arguments "P x Q first-<i> tag-<i>":
//                so P becomes Q at once
//   tANYTHING    exit 0
//
// Without arguments it exits 0. A failed call exits 120 or above.
#include <asm/unistd.h>

typedef long i64;

static i64 sys(i64 n, i64 a, i64 b, i64 c, i64 d, i64 e) {
#if defined(__x86_64__)
	register i64 r10 __asm__("r10") = d, r8 __asm__("r8") = e;
	i64 r;
	__asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8) : "rcx", "r11", "memory");
	return r;
#elif defined(__aarch64__)
	register i64 x8 __asm__("x8") = n, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c, x3 __asm__("x3") = d, x4 __asm__("x4") = e;
	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4) : "memory");
	return x0;
#endif
}

static void quit(i64 code) {
	for (;;) sys(__NR_exit_group, code, 0, 0, 0, 0);
}

static i64 must(i64 r, i64 code) {
	if (r < 0) quit(code);
	return r;
}

static i64 number(const char *s) {
	i64 n = 0;
	while (*s >= '0' && *s <= '9') n = n * 10 + (*s++ - '0');
	return n;
}

static void tag(char *dst, const char *prefix, i64 n) {
	char d[20];
	int k = 0;
	while (*prefix) *dst++ = *prefix++;
	do d[k++] = '0' + n % 10; while (n /= 10);
	while (k) *dst++ = d[--k];
	*dst = 0;
}

#define SIGCHLD 17
#define CLONE_PARENT 0x8000

static void run(char *path, char **argv) {
	char *env[] = {0};
	i64 pid = must(sys(__NR_clone, SIGCHLD, 0, 0, 0, 0), 121);
	if (pid == 0) {
		sys(__NR_execve, (i64)path, (i64)argv, (i64)env, 0, 0);
		quit(122);
	}
	must(sys(__NR_wait4, pid, 0, 0, 0, 0), 123);
}

static void count(i64 n) {
	for (volatile i64 i = 0; i < n; i++);
}

__attribute__((used)) void entry(i64 *sp) {
	char **v = (char **)(sp + 1), *env[] = {0}, byte, f[32], t[32];
	if (*v) v++;
	for (; *v; v++) {
		switch (**v) {
		case 'r':
			if (must(sys(__NR_read, 0, (i64)&byte, 1, 0, 0), 124) != 1) quit(125);
			break;
		case 'w':
			while (must(sys(__NR_read, 0, (i64)&byte, 1, 0, 0), 124) == 1);
			quit(0);
		case 'x':
			sys(__NR_execve, (i64)v[1], (i64)(v + 2), (i64)env, 0, 0);
			quit(126);
		case 'f':
			sys(__NR_execveat, number(v[1]), (i64) "", (i64)(v + 2), (i64)env, 0x1000 /* AT_EMPTY_PATH */);
			quit(127);
		case 'u':
			must(sys(__NR_setresgid, 2000, 2001, 2002, 0, 0), 128);
			must(sys(__NR_setresuid, 1000, 1001, 1002, 0, 0), 128);
			break;
		case 's':
			must(sys(__NR_setsid, 0, 0, 0, 0, 0), 129);
			break;
		case 'c':
			if (must(sys(__NR_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0), 121) == 0) quit(7);
			break;
		case 'p': {
			i64 pid = must(sys(__NR_clone, SIGCHLD, 0, 0, 0, 0), 121);
			if (pid == 0) {
				i64 hour[2] = {3600, 0};
				for (;;) sys(__NR_nanosleep, (i64)hour, 0, 0, 0, 0);
			}
			// The child ends with its tracer.
			if (sys(__NR_ptrace, 0x4206 /* PTRACE_SEIZE */, pid, 0, 0x100000 /* PTRACE_O_EXITKILL */, 0) < 0) {
				sys(__NR_kill, pid, 9, 0, 0, 0);
				quit(131);
			}
			break;
		}
		case 'm':
			must(sys(__NR_prctl, 15, (i64)*++v, 0, 0, 0), 132);
			break;
		case 'b':
			count(number(*++v) * 1000000);
			break;
		case 'k':
			for (;;) count(1000000);
		case 'a':
			sys(__NR_kill, sys(__NR_getpid, 0, 0, 0, 0, 0), 6, 0, 0, 0);
			quit(130);
		case 't':
			quit(0);
		case 'e':
			quit(number(v[1]));
		case 'n':
			for (i64 i = 0; i < number(v[1]); i++) {
				char *a[] = {"tiny", t, 0};
				tag(t, "tag-", i);
				run(v[2], a);
			}
			quit(0);
		case 'd':
			for (i64 i = 0; i < number(v[1]); i++) {
				char *a[] = {v[2], "x", v[3], f, t, 0};
				tag(f, "first-", i);
				tag(t, "tag-", i);
				run(v[2], a);
			}
			quit(0);
		default:
			quit(120);
		}
	}
	quit(0);
}

#if defined(__x86_64__)
__asm__(".globl _start\n_start: mov %rsp, %rdi\n and $-16, %rsp\n call entry\n");
#elif defined(__aarch64__)
__asm__(".globl _start\n_start: mov x0, sp\n bl entry\n");
#endif
