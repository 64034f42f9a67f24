#!/usr/bin/env bash
# Every test, with the race detector. As root the real kernel, BPF, full disks
# and namespaces are used; otherwise those tests skip and say why.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$(id -u)" -ne 0 ] && [ -z "${PROCESSION_NO_SKIP:-}" ]; then
	echo "not root: tests that need the real kernel will skip"
fi
CGO_ENABLED=1 go test -race -timeout 10m ${GOTESTFLAGS:-} ./...

# Tests that need more than the product does are modules of their own.
(cd test/crds && go test -timeout 10m ./...)
(cd test/chart && go test -timeout 15m ./...)
