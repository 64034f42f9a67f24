// Package matchtest makes rules and events to test the evaluation of rules
// with: conditions as people write them, from which any number of others is
// grown; conditions nobody would write; the everyday life of a node; and
// events about which half of the facts are missing.
//
// Everything is drawn from the random source it is given: the same seed makes
// the same rules and events.
package matchtest
