// burn seconds
//
// Keeps every CPU busy for that long, one process per CPU, and says "busy" when
// they run. Ends with its parent.
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	int seconds = argc == 2 ? atoi(argv[1]) : 0;
	cpu_set_t all;
	if (seconds < 1 || seconds > 3600) {
		fprintf(stderr, "usage: burn seconds (1 to 3600)\n");
		return 2;
	}
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (sched_getaffinity(0, sizeof all, &all))
		return 1;
	for (int c = 0; c < CPU_SETSIZE; c++) {
		if (!CPU_ISSET(c, &all))
			continue;
		pid_t parent = getpid(), pid = fork();
		if (pid < 0)
			return 1;
		if (pid == 0) {
			cpu_set_t one;
			CPU_ZERO(&one);
			CPU_SET(c, &one);
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			if (getppid() != parent || sched_setaffinity(0, sizeof one, &one))
				_exit(1);
			alarm(seconds);
			for (volatile unsigned long x = 0;; x++)
				;
		}
	}
	printf("busy\n");
	fflush(stdout);
	while (wait(NULL) > 0)
		;
	return 0;
}
