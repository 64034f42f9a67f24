#!/usr/bin/env bash
# Installs what a Kubernetes node needs from Debian; the Kubernetes programs
# themselves come from hack/kubernetes.sh.
set -euo pipefail
need=()
[ -x /usr/lib/cni/ptp ] || need+=(ptp:containernetworking-plugins)
exec "$(dirname "$0")/deps.sh" containerd:containerd runc:runc etcd:etcd-server nft:nftables \
	buildah:buildah "${need[@]}"
