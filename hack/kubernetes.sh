#!/usr/bin/env bash
# Builds the Kubernetes programs of the test cluster and helm from their Go
# modules (test/e2e/kubernetes/go.mod pins them), once per version, and prints
# the directory they are in: hack/kubernetes.sh [kubernetes] [helm].
#
# The directory is named by what decides its content: the pinned modules, the
# program, the Go release. Nothing else is ever written to it, so it may be shared
# and kept; two builds at a time wait for each other.
set -euo pipefail
cd "$(dirname "$0")/../test/e2e/kubernetes"
[ $# -gt 0 ] || set -- kubernetes helm

version() { awk -v m="$1" '$1 == m && $2 ~ /^v/ { print $2; exit }' go.mod; }
kube=$(version k8s.io/kubernetes) helm=$(version helm.sh/helm/v3)
key=$kube-$({ cat go.mod go.sum main.go; go env GOVERSION GOARCH; } | sha256sum | cut -c1-12)
cache=${PROCESSION_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/procession}/k8s
dir=$cache/$key
mkdir -p "$dir"

# build PROGRAM LINK-FLAGS PACKAGE: the name appears when the file is whole.
build() {
	[ -x "$dir/$1" ] && return
	echo "building $1 into $dir (once; several minutes from an empty build cache)" >&2
	local t=$SECONDS
	CGO_ENABLED=0 GOFLAGS=-buildvcs=false nice -n 5 go build -trimpath -ldflags "-s -w $2" -o "$dir/.$1" "$3" >&2
	mv "$dir/.$1" "$dir/$1"
	echo "built $1 in $((SECONDS - t)) s" >&2
}

exec 9>"$cache/lock"
flock 9
for program in "$@"; do
	case $program in
	kubernetes)
		# Without the version the server calls itself v0.0.0-master, which kubectl cannot parse.
		v=k8s.io/component-base/version minor=${kube#v1.}
		build kubernetes "-X $v.gitVersion=$kube -X $v.gitMajor=1 -X $v.gitMinor=${minor%%.*}" .
		for name in kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl; do
			ln -sf kubernetes "$dir/$name"
		done
		;;
	helm) build helm "-X helm.sh/helm/v3/internal/version.version=$helm" helm.sh/helm/v3/cmd/helm ;;
	*)
		echo "kubernetes.sh: $program is not kubernetes or helm" >&2
		exit 2
		;;
	esac
done
echo "$dir"
