// cflags: -pthread
// threadexec <tag>-<i>; program
//
// Like stage, but it is a second thread that becomes program: the kernel ends
// the first one and gives its pid to the second.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char *program, arg[256];

static void *become(void *unused)
{
	(void)unused;
	execl(program, program, arg, (char *)0);
	_exit(1);
}

int main(int argc, char **argv)
{
	pthread_t t;
	char *dash;
	if (argc != 3 || strlen(argv[1]) > 200 || !(dash = strrchr(argv[1], '-')))
		return 2;
	snprintf(arg, sizeof arg, "%.*s-%ld;", (int)(dash - argv[1]), argv[1], atol(dash + 1) + 1);
	program = argv[2];
	if (pthread_create(&t, NULL, become, NULL))
		return 1;
	pause();
	return 1;
}
