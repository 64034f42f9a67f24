package present

import pb "github.com/procession-dev/procession/api/proto/procession/v1"

// Amend puts what an amendment says into its alert, so that who looks for the
// alert sees one, with what is known by now. Nothing that is known is taken
// back: amendments may be applied twice, and in any order.
func Amend(a *pb.Alert, m *pb.Amendment) {
	ev := a.GetEvent()
	if ev == nil {
		return
	}
	was := ev.GetPlaceReason()
	before := known(ev.GetPod(), ev.GetContainer())
	if p := m.GetPod(); p.GetName() != "" || ev.GetPod() == nil {
		ev.Pod = p
	}
	if c := m.GetContainer(); c.GetName() != "" || c.GetSandbox() || ev.GetContainer() == nil {
		ev.Container = c
	}
	if p := m.GetPlace(); p != "" && p != "unknown" || m.GetPlaceReason() == "conflict" {
		ev.Place = p
	}
	if was != "" && known(m.GetPod(), m.GetContainer()) >= before {
		ev.PlaceReason = m.GetPlaceReason()
	}
}

// known counts what is known of where a process runs.
func known(p *pb.Pod, c *pb.Container) (n int) {
	if p.GetName() != "" {
		n++
	}
	if c.GetName() != "" || c.GetSandbox() {
		n++
	}
	return n
}
