// Package v1alpha1 holds the objects users write: group procession.dev,
// version v1alpha1. The comment on a field is its manual: what it means, its
// unit, its limits, an example.
//
// A field is here only when the agent does what it says. Fields that are
// designed but not built are absent, so that an object which uses one is
// refused by name rather than accepted and ignored; see NotYet.
//
// The types carry kubebuilder markers, from which the CRD is generated. The
// agent does not trust that the API server checked them: internal/policy
// checks every limit again.
//
// +kubebuilder:object:generate=true
// +groupName=procession.dev
package v1alpha1

//go:generate go tool -modfile=../../tools/go.mod controller-gen object paths=.
