// The shortest life a process can have: it exits with its first instructions,
// some 20 us after its exec.
#if defined(__x86_64__)
__asm__(".globl _start\n_start: mov $60, %eax\n xor %edi, %edi\n syscall\n");
#elif defined(__aarch64__)
__asm__(".globl _start\n_start: mov x8, #93\n mov x0, #0\n svc #0\n");
#else
#error "write the exit system call of this machine here"
#endif
