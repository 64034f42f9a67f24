package agent

import "time"

// promptNice is the priority of all of a running agent's threads. A flood of
// tasks fills the kernel's queues with thousands that want a CPU; at ordinary
// priority each step of an alert, from the reader to the disk and to the
// collector, would wait its turn among them. The threads need it all together:
// whoever runs Go code at ordinary priority can be the one the reader waits for.
const promptNice = -10

// promptShare is how much of a CPU the agent may use before the others of this
// machine for the length of promptWindow: then it is a program like any other
// until it has used less. So it cannot starve a node, whatever keeps it busy.
const (
	promptShare  = 0.5
	promptWindow = time.Second
)

// A prompter gives the agent's threads their priority, and takes it back while
// they use too much of it. The zero value does nothing.
type prompter struct {
	renice func(nice int) error // of all threads
	used   func() time.Duration // CPU time of the process

	allowed bool // to change the priority; once refused it stays as it is
	on      bool
	at      time.Time // when used was asked, and what it was
	then    time.Duration
}

// start makes the agent prompt. That needs CAP_SYS_NICE; what its lack costs is
// in the coverage (procconn.Status).
func (p *prompter) start(now time.Time) {
	if p.renice == nil {
		return
	}
	p.at, p.then = now, p.used()
	p.allowed = p.renice(promptNice) == nil
	p.on = p.allowed
}

// look is for the event path, which calls it often: after each drain.
func (p *prompter) look(now time.Time) {
	if !p.allowed || now.Sub(p.at) < promptWindow {
		return
	}
	used := p.used()
	on := float64(used-p.then) <= promptShare*float64(now.Sub(p.at))
	p.at, p.then = now, used
	if on == p.on {
		return
	}
	nice := 0
	if on {
		nice = promptNice
	}
	p.allowed = p.renice(nice) == nil
	p.on = on
}
