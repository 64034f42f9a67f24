// Package house holds the rules of the repository itself: who may import
// whom, which package is the home of a heavy dependency, and that every
// package says what it promises.
package house
