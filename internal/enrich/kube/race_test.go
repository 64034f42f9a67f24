//go:build race

package kube

// raced says that everything takes ten times as long.
const raced = true
