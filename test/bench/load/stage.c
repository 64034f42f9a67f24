// stage <tag>-<i>; program
//
// Becomes program at once, with the argument <tag>-<i+1>; as its first: two
// execs of one process, with next to no time between them.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	char arg[256], *dash;
	if (argc != 3 || strlen(argv[1]) > 200 || !(dash = strrchr(argv[1], '-')))
		return 2;
	snprintf(arg, sizeof arg, "%.*s-%ld;", (int)(dash - argv[1]), argv[1], atol(dash + 1) + 1);
	execl(argv[2], argv[2], arg, (char *)0);
	return 1;
}
