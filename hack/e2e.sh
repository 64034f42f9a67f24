#!/usr/bin/env bash
# Every test on a real cluster, one package after the other: they share it.
set -euo pipefail
cd "$(dirname "$0")/.."
go test -tags e2e -count=1 -p 1 -timeout 60m -v ${E2EFLAGS:-} ./test/e2e/...
