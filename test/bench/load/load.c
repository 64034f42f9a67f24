// load [-n count] [-g gap_us] [-s step] [-x next] [-c cgroup[:cgroup]] [-t file] program tag
//
// Runs a program count times, one after the other, as fast as posix_spawn can,
// or with a gap between. Run i has the arguments "<tag>-<i*step>;" and next, if
// given: a program that itself runs another takes the numbers in between.
// Before that it joins the cgroups. Writes one JSON object: what a run took,
// from before the spawn to after the wait, in ns. With -t the CLOCK_REALTIME of
// each spawn, in ns, goes into a file, one a line: an observer's latency starts
// there.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long now(clockid_t c)
{
	struct timespec t;
	clock_gettime(c, &t);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

static int ascending(const void *a, const void *b)
{
	long x = *(const long *)a, y = *(const long *)b;
	return x < y ? -1 : x > y;
}

static void die(const char *what)
{
	fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void join(char *dirs)
{
	for (char *d = strtok(dirs, ":"); d; d = strtok(NULL, ":")) {
		char path[4096];
		snprintf(path, sizeof path, "%s/cgroup.procs", d);
		int fd = open(path, O_WRONLY);
		if (fd < 0 || write(fd, "0", 1) != 1)
			die(path);
		close(fd);
	}
}

int main(int argc, char **argv)
{
	long n = 1000, gap = 0, step = 1;
	char *next = NULL, *times = NULL;
	int o;
	while ((o = getopt(argc, argv, "n:g:s:x:c:t:")) != -1) {
		switch (o) {
		case 'n': n = atol(optarg); break;
		case 'g': gap = atol(optarg); break;
		case 's': step = atol(optarg); break;
		case 'x': next = optarg; break;
		case 'c': join(optarg); break;
		case 't': times = optarg; break;
		default: return 2;
		}
	}
	if (argc - optind != 2 || n < 1 || n > 10000000 || step < 1) {
		fprintf(stderr, "usage: load [-n count] [-g gap_us] [-s step] [-x next] [-c cgroups] [-t file] program tag\n");
		return 2;
	}
	char *prog = argv[optind], *tag = argv[optind + 1];
	long *took = calloc(n, sizeof *took), *at = calloc(n, sizeof *at);
	if (!took || !at)
		die("memory");
	char *env[] = {"PATH=/usr/bin:/bin", NULL};
	int bad = 0;
	long start = now(CLOCK_MONOTONIC);
	for (long i = 0; i < n; i++) {
		char arg[128];
		snprintf(arg, sizeof arg, "%s-%ld;", tag, i * step);
		char *args[] = {prog, arg, next, NULL};
		pid_t pid;
		int status;
		at[i] = now(CLOCK_REALTIME);
		long t = now(CLOCK_MONOTONIC);
		if ((errno = posix_spawn(&pid, prog, NULL, NULL, args, env)))
			die(prog);
		if (waitpid(pid, &status, 0) != pid)
			die("wait");
		took[i] = now(CLOCK_MONOTONIC) - t;
		bad += status != 0;
		if (gap)
			usleep(gap);
	}
	long wall = now(CLOCK_MONOTONIC) - start;
	if (times) {
		FILE *f = fopen(times, "w");
		if (!f)
			die(times);
		for (long i = 0; i < n; i++)
			fprintf(f, "%ld\n", at[i]);
		if (fclose(f))
			die(times);
	}
	double sum = 0;
	for (long i = 0; i < n; i++)
		sum += took[i];
	qsort(took, n, sizeof *took, ascending);
	printf("{\"runs\":%ld,\"execs\":%ld,\"failed\":%d,\"wallNs\":%ld,\"meanNs\":%.0f,\"minNs\":%ld,\"p50Ns\":%ld,\"p90Ns\":%ld,\"p99Ns\":%ld}\n",
	       n, n * step, bad, wall, sum / n, took[0], took[n / 2], took[n * 9 / 10], took[n * 99 / 100]);
	return bad != 0;
}
