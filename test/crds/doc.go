// Package crds holds the generated CustomResourceDefinitions, and objects good
// and bad, against the API server's own code. It is a module of its own: that
// code is large, and nothing of the product needs it.
package crds
