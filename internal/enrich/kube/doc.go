// Package kube knows the pods of this node.
//
// It asks the kubelet, which knows a pod before the pod's first program runs:
// over the socket of its Pods API where there is one, else over HTTPS at /pods
// with a service account's token; and, only if allowed to, the API server by a
// watch of the pods with this node's name. The first that answers is used, and
// when it fails all are tried again, in that order. Status says which it is
// and what each of them answered.
//
// What it promises:
//
//   - Find and Generation take no lock, make no call and allocate nothing: they
//     look at the last list that was received whole.
//   - An answer that breaks off, is no list of pods, or is too large changes
//     nothing: the last good list stays. Failures are counted by cause.
//   - A pod that Want asks for is looked for at once, then less and less often,
//     and given up after a while; however many are wanted, and however often,
//     the list is fetched at a bounded rate and share of time.
//   - Memory is bounded: by MaxPods, by what is kept of each (its name, labels,
//     owner and containers, 1 to 2 KB), and while reading by one pod's object.
//   - The last list is on disk, checksummed: after a restart with the kubelet
//     down, pods that were known are known. A pod's uid, namespace and name never
//     change, so an old list can lack pods and have old labels, but never the
//     wrong pod.
//   - Whoever answers is believed: it is the kubelet's root-owned socket, or a
//     server whose certificate was checked. Nothing comes from a workload.
//
// Decoding reads the few fields that are kept, from JSON and from protobuf, with
// the same result. The types of k8s.io/api are not used for it: they would cost
// more memory than all that is known here.
package kube
