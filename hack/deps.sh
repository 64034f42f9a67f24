#!/usr/bin/env bash
# Installs the Debian packages that tests and tools need beyond Go, make and
# gcc. Not root: names what is missing and fails only for what tests cannot do
# without.
set -euo pipefail
need=() # command:package
for cp in gcc:gcc ip:iproute2 unshare:util-linux mount:mount protoc:protobuf-compiler \
	mkfs.ext4:e2fsprogs runc:runc cpio:cpio busybox:busybox-static xz:xz-utils "$@"; do
	command -v "${cp%%:*}" >/dev/null || need+=("${cp##*:}")
done
# Debian keeps the server's programs out of the way.
if ! ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then need+=(postgresql); fi
# The race detector is a cgo program: it needs the C library's headers.
if ! echo '#include <stdlib.h>' | gcc -E - >/dev/null 2>&1; then need+=(libc6-dev); fi
[ ${#need[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ]; then
	echo "missing: ${need[*]}" >&2
	echo "install with: sudo apt-get install ${need[*]}" >&2
	exit 1
fi
if ! command -v apt-get >/dev/null; then
	echo "missing: ${need[*]} (this is not Debian: install them with your package manager)" >&2
	exit 1
fi
echo "installing from Debian: ${need[*]}"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${need[@]}" >/dev/null
