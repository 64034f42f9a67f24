#!/usr/bin/env bash
# Prints the path of helm 3, built from its Go module once per version.
set -euo pipefail
echo "$("$(dirname "$0")/kubernetes.sh" helm)/helm"
