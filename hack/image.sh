#!/usr/bin/env bash
# Builds OCI images of agent and collector from dist/ with buildah, from
# scratch and without a registry: hack/image.sh amd64 arm64. The same binaries
# give the same archive, byte for byte.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${VERSION:-unknown}
epoch=$(git log -1 --format=%ct 2>/dev/null || echo 0) # same commit, same image
if ! command -v buildah >/dev/null; then
	if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
		echo "installing from Debian: buildah"
		apt-get update -qq
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends buildah >/dev/null
	else
		echo "image: buildah is missing: apt-get install buildah" >&2
		exit 1
	fi
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for arch in "$@"; do
	for target in agent collector; do
		out=dist/$target-linux-$arch.oci.tar layout=$work/$target-$arch
		buildah build --quiet --isolation chroot --storage-driver vfs --network host --timestamp "$epoch" \
			--platform "linux/$arch" --build-arg "TARGETARCH=$arch" --build-arg "VERSION=$version" \
			--target "$target" --tag "procession/$target:$version-$arch" . >/dev/null
		buildah push --quiet --storage-driver vfs "procession/$target:$version-$arch" \
			"oci:$layout:docker.io/procession/$target:$version" # in full: containerd adds nothing to a short name
		# The digest is the same each time; with names sorted and times fixed the archive is too.
		tar --create --file "$out" --directory "$layout" --sort=name --mtime="@$epoch" \
			--owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX blobs index.json oci-layout
		printf '%-36s %5.1f MiB  %s\n' "$out" "$(stat -c %s "$out" | awk '{print $1/1048576}')" \
			"$(sed -n 's/.*"digest":"\([^"]*\)".*/\1/p' "$layout/index.json")"
	done
done
