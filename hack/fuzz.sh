#!/usr/bin/env bash
# Runs each fuzz target of the repository for a while: hack/fuzz.sh [TIME].
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-20s}
grep -rlE '^func Fuzz[A-Z]' --include='*_test.go' internal api | sort | while read -r f; do
	grep -oE '^func Fuzz[A-Za-z0-9_]+' "$f" | awk '{print $2}' | while read -r target; do
		echo "== $target ($(dirname "$f"))"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 10x "./$(dirname "$f")" </dev/null
	done
done
