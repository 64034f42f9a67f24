// Package chart renders the Helm chart as Helm does, over a matrix of values and
// versions of Kubernetes, and takes each object through what an API server
// would say about it. It is a module of its own, because Helm is large.
package chart
