//go:build !linux

package agent

// newPrompter has nothing to do where agent run cannot run.
func newPrompter() prompter { return prompter{} }
