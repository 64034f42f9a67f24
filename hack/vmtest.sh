#!/usr/bin/env bash
# Boots Debian's kernels in emulation and runs the tests of the recorder, the
# connector and the fall-back on each: hack/vmtest.sh [KERNEL...]. Without kernels, all
# that docs/capture.md has. The facts each gave are written to
# bin/kernels.md. What the fall-back gets in its race with short processes says
# nothing in an emulator, so those tests are left out.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p bin
kernels=${*:-5.10-amd64 6.1-amd64 6.12-amd64 sid-amd64 6.12-arm64}
go run ./test/vm -kernels "$(echo "$kernels" | tr ' ' ,)" -facts bin/kernels.md \
	-timeout 25m -test-timeout 15m -skip '^Test(ShortProcesses|ShortProcessesBusy|SingleReader)$' \
	./test/vm/probe ./internal/procconn/recorder ./internal/procconn -- -test.short
