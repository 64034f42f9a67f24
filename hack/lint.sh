#!/usr/bin/env bash
# Few linters, each for a reason: gofmt (one form), vet (real bugs), staticcheck
# (real bugs, dead code, deprecated calls), bash -n (scripts that do not parse).
set -euo pipefail
cd "$(dirname "$0")/.."
bad=$(gofmt -l api cmd internal test)
if [ -n "$bad" ]; then
	echo "gofmt would change:" >&2
	echo "$bad" >&2
	exit 1
fi
go vet ./...
go vet -tags e2e ./test/e2e/...
# The decoders and the tables build everywhere: authors replay on other systems.
GOOS=darwin GOARCH=arm64 go vet ./internal/event ./internal/procfs ./internal/proctable ./internal/policy/... ./internal/procconn/... \
	./internal/replay ./internal/author ./cmd/procession
GOOS=darwin GOARCH=arm64 CGO_ENABLED=0 go build -o /dev/null ./cmd/agent ./cmd/procession
GOOS=linux GOARCH=arm64 go vet ./internal/... ./cmd/...
mkdir -p bin/tools
(cd tools && go build -o ../bin/tools/ honnef.co/go/tools/cmd/staticcheck)
bin/tools/staticcheck -tags e2e ./...
for s in hack/*.sh .ci/run; do bash -n "$s"; done
