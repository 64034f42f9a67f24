// Package e2e tests Procession as its users have it: images, chart and policies
// on a real Kubernetes node (package cluster), attacked from inside its pods.
//
// The tests carry the build tag e2e and need root; make e2e runs them.
package e2e
