package present

import (
	"testing"

	"google.golang.org/protobuf/proto"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
)

func TestAmend(t *testing.T) {
	bare := func() *pb.Alert {
		return &pb.Alert{Rule: "r", Event: &pb.Event{Place: "container", PlaceReason: "pod-not-listed",
			Pod: &pb.Pod{Uid: "u"}, Container: &pb.Container{Id: "c"}}}
	}
	pod := &pb.Pod{Uid: "u", Namespace: "shop", Name: "web"}
	first := &pb.Amendment{Place: "container", PlaceReason: "container-not-listed", Pod: pod, Container: &pb.Container{Id: "c"}}
	second := &pb.Amendment{Place: "container", Pod: pod, Container: &pb.Container{Id: "c", Name: "main"}}
	gaveUp := &pb.Amendment{Place: "container", PlaceReason: "gave-up pod-not-listed", Pod: &pb.Pod{Uid: "u"}, Container: &pb.Container{Id: "c"}}
	conflict := &pb.Amendment{Place: "unknown", PlaceReason: "conflict", Pod: &pb.Pod{Uid: "u"}, Container: &pb.Container{Id: "c"}}

	full := bare()
	full.Event.PlaceReason, full.Event.Pod, full.Event.Container = "", pod, second.Container
	half := bare()
	half.Event.PlaceReason, half.Event.Pod = "container-not-listed", pod
	none := bare()
	none.Event.PlaceReason = "gave-up pod-not-listed"
	refused := bare()
	refused.Event.Place, refused.Event.PlaceReason = "unknown", "conflict"

	for _, c := range []struct {
		name string
		ms   []*pb.Amendment
		want *pb.Alert
	}{
		{"none", nil, bare()},
		{"the pod", []*pb.Amendment{first}, half},
		{"the container", []*pb.Amendment{first, second}, full},
		{"in another order", []*pb.Amendment{second, first}, full},
		{"twice", []*pb.Amendment{first, second, first, second}, full},
		{"given up", []*pb.Amendment{gaveUp}, none},
		{"given up before", []*pb.Amendment{gaveUp, second}, full},
		{"conflict", []*pb.Amendment{conflict}, refused},
		{"empty", []*pb.Amendment{{}}, func() *pb.Alert { a := bare(); a.Event.PlaceReason = ""; return a }()},
	} {
		a := bare()
		for _, m := range c.ms {
			Amend(a, m)
		}
		if !proto.Equal(a, c.want) {
			t.Errorf("%s:\n got %v\nwant %v", c.name, a, c.want)
		}
	}
	Amend(&pb.Alert{}, first) // an alert without an event stays one
	Amend(nil, first)
}
