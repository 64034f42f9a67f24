package kube

import (
	"bytes"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/procession-dev/procession/internal/event"
)

// full is a pod with all that is read.
func full() *corev1.Pod {
	p := pod(1, "shop", "web-7d9c6f8b5b-x2x9z")
	yes, always := true, corev1.ContainerRestartPolicyAlways
	exec := func(args ...string) *corev1.ExecAction { return &corev1.ExecAction{Command: args} }
	p.Spec.HostPID, p.Spec.HostNetwork, p.Spec.HostIPC = true, true, true
	c := &p.Spec.Containers[0]
	c.SecurityContext = &corev1.SecurityContext{Privileged: &yes}
	c.ReadinessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: exec("/bin/ready")}}
	c.StartupProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: exec("/bin/ready")}} // the same again
	c.Lifecycle = &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{Exec: exec("sh", "-c", "echo hi")}, PreStop: &corev1.LifecycleHandler{Exec: exec("/bin/stop")}}
	p.Spec.InitContainers = []corev1.Container{{Name: "setup", Image: "busybox"}, {Name: "proxy", Image: "envoy", RestartPolicy: &always}}
	p.Spec.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: "debug", Image: "busybox:debug"}}}
	p.Status.InitContainerStatuses = []corev1.ContainerStatus{
		{Name: "setup", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ContainerID: "containerd://" + id(2)}}},
		{Name: "proxy", ContainerID: "cri-o://" + id(3), ImageID: "sha256:" + id(78)},
	}
	p.Status.EphemeralContainerStatuses = []corev1.ContainerStatus{{Name: "debug", ContainerID: "docker://" + id(4)}}
	p.Status.ContainerStatuses[0].LastTerminationState.Terminated = &corev1.ContainerStateTerminated{ContainerID: "containerd://" + id(5)}
	return p
}

func TestWhatIsKept(t *testing.T) {
	p := full()
	for name, decode := range map[string]func() wirePod{
		"json": func() (w wirePod) {
			b, err := json.Marshal(p)
			if err == nil {
				err = json.Unmarshal(b, &w)
			}
			if err != nil {
				t.Fatal(err)
			}
			return w
		},
		"protobuf": func() (w wirePod) {
			b, err := p.Marshal()
			if err == nil {
				err = decodeProto(b, &w)
			}
			if err != nil {
				t.Fatal(err)
			}
			return w
		},
	} {
		w := decode()
		got, ok := w.keep([]string{"team", "none"})
		if !ok {
			t.Fatalf("%s: not kept", name)
		}
		want := &Pod{
			Pod: event.Pod{
				UID: uid(1), Namespace: "shop", Name: "web-7d9c6f8b5b-x2x9z", ServiceAccount: "shop",
				Labels: map[string]string{"app": "web", "pod-template-hash": "7d9c6f8b5b"}, Annotations: map[string]string{"team": "shop"},
				OwnerKind: "Deployment", OwnerName: "web", HostPID: true, HostNetwork: true, HostIPC: true,
			},
			Containers: []event.Container{
				{Name: "setup", Kind: event.ContainerInit, Image: "busybox"},
				{Name: "proxy", Kind: event.ContainerSidecar, Image: "envoy", Runtime: "cri-o"},
				{Name: "web", Image: "registry.example/shop/web:1.2", ImageDigest: "sha256:" + id(77), Runtime: "containerd", Privileged: true,
					Probes: [][]string{{"/bin/check", "--fast"}, {"/bin/ready"}}, Hooks: [][]string{{"sh", "-c", "echo hi"}, {"/bin/stop"}}},
				{Name: "debug", Kind: event.ContainerEphemeral, Image: "busybox:debug", Runtime: "docker"},
			},
			IDs: []ContainerID{{id(2), 0}, {id(3), 1}, {id(1), 2}, {id(5), 2}, {id(4), 3}},
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestOwner(t *testing.T) {
	yes := true
	for _, c := range []struct {
		name             string
		owners           []metav1.OwnerReference
		hash, kind, want string
	}{
		{"none", nil, "", "", ""},
		{"a deployment's", []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web-abc", Controller: &yes}}, "abc", "Deployment", "web"},
		{"a replica set somebody made", []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web-abc", Controller: &yes}}, "", "ReplicaSet", "web-abc"},
		{"a replica set with another hash", []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web-abc", Controller: &yes}}, "bc", "ReplicaSet", "web-abc"},
		{"a replica set called as the hash", []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "-abc", Controller: &yes}}, "abc", "ReplicaSet", "-abc"},
		{"a daemon set", []metav1.OwnerReference{{Kind: "DaemonSet", Name: "cni", Controller: &yes}}, "abc", "DaemonSet", "cni"},
		{"a job", []metav1.OwnerReference{{Kind: "Job", Name: "backup-28930000", Controller: &yes}}, "", "Job", "backup-28930000"},
		{"not the controller", []metav1.OwnerReference{{Kind: "Node", Name: "n"}}, "", "", ""},
	} {
		p := pod(1, "shop", "web")
		p.OwnerReferences = c.owners
		p.Labels = map[string]string{"pod-template-hash": c.hash}
		if got := kept(t, p); got.OwnerKind != c.kind || got.OwnerName != c.want {
			t.Errorf("%s: got %s %s, want %s %s", c.name, got.OwnerKind, got.OwnerName, c.kind, c.want)
		}
	}
}

// Text of any length and number is kept within bounds.
func TestPodsAreBounded(t *testing.T) {
	p := full()
	long := strings.Repeat("x", 100<<10)
	p.Labels = map[string]string{long: "v", "k": long}
	for i := range 10 * maxLabels {
		p.Labels[fmt.Sprintf("k%d", i)] = "v"
	}
	p.Annotations["team"] = long
	p.Spec.ServiceAccountName = long
	p.Spec.Containers[0].Image = long
	p.Spec.Containers[0].LivenessProbe.Exec.Command = []string{long}
	for i := range 10 * maxContainers {
		p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: fmt.Sprintf("c%d", i)})
	}
	got := kept(t, p)
	switch {
	case len(got.Labels) > maxLabels, len(got.ServiceAccount) > maxName, len(got.Annotations["team"]) > maxAnnotation:
		t.Errorf("%d labels, service account of %d bytes", len(got.Labels), len(got.ServiceAccount))
	case len(got.Containers) > maxContainers+3, len(got.Containers[2].Image) > maxImage, len(got.Containers[2].Probes) != 1:
		t.Errorf("%d containers, image of %d bytes, probes %d", len(got.Containers), len(got.Containers[2].Image), len(got.Containers[2].Probes))
	}
	p.Name = long
	b, _ := json.Marshal(p)
	var w wirePod
	if err := json.Unmarshal(b, &w); err != nil {
		t.Fatal(err)
	}
	if _, ok := w.keep(nil); ok {
		t.Error("a name of 100 KiB is kept")
	}
}

// fleet is a list of n pods as a busy node has them.
func fleet(n int) []byte {
	var pods []*corev1.Pod
	for i := range n {
		p := full()
		p.UID = pod(i, "", "").UID
		p.Namespace = fmt.Sprintf("team-%d", i%20)
		p.Name = fmt.Sprintf("web-%d-7d9c6f8b5b-x%04d", i%50, i)
		p.Labels = map[string]string{
			"app.kubernetes.io/name": fmt.Sprintf("web-%d", i%50), "app.kubernetes.io/instance": "prod", "app.kubernetes.io/version": "1.2.3",
			"team": fmt.Sprintf("team-%d", i%20), "pod-template-hash": "7d9c6f8b5b",
		}
		for j := range p.Status.InitContainerStatuses {
			p.Status.InitContainerStatuses[j].ContainerID = "containerd://" + id(10*i+j)
		}
		p.Status.ContainerStatuses[0].ContainerID = "containerd://" + id(10*i+5)
		p.Spec.EphemeralContainers = nil
		p.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: "kubelet", FieldsV1: metav1.NewFieldsV1(`{"f:a":` + strings.Repeat(`{"f:b":`, 50) + "{}" + strings.Repeat("}", 50) + "}")}}
		pods = append(pods, p)
	}
	b, err := json.Marshal(podList(pods...))
	if err != nil {
		panic(err)
	}
	return b
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// A pod of three containers stays within a few kilobytes, though its object
// has more.
func TestMemoryPerPod(t *testing.T) {
	const n = 500
	b := fleet(n)
	p, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	before := heap()
	pods, rejected, _, err := p.read(newDecoder(bytes.NewReader(b)))
	if err != nil || len(pods) != n || rejected != 0 {
		t.Fatalf("%d pods, %d rejected, %v", len(pods), rejected, err)
	}
	p.replace(pods, 0)
	pods = nil
	per := int64(heap()-before) / n
	t.Logf("%d bytes kept of each pod, whose object has %d", per, len(b)/n)
	if per > 3<<10 {
		t.Errorf("%d bytes a pod", per)
	}
	runtime.KeepAlive(p)
	runtime.KeepAlive(b)
}

func BenchmarkList(b *testing.B) {
	for _, n := range []int{10, 110, 500} {
		text := fleet(n)
		b.Run(fmt.Sprintf("pods=%d", n), func(b *testing.B) {
			p, err := New(Config{})
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			b.SetBytes(int64(len(text)))
			for b.Loop() {
				pods, _, _, err := p.read(newDecoder(bytes.NewReader(text)))
				if err != nil {
					b.Fatal(err)
				}
				p.replace(pods, 0)
			}
		})
	}
}

func sealed(pods string) []byte {
	return append(fmt.Appendf(nil, fileHead, crc32.Checksum([]byte(pods), castagnoli), len(pods)), pods...)
}

func checkPod(t *testing.T, p *Pod) {
	t.Helper()
	if p.UID == "" || p.Name == "" || p.Namespace == "" || len(p.Labels) > maxLabels || len(p.Containers) > 3*maxContainers {
		t.Fatalf("kept %+v", p)
	}
	for _, i := range p.IDs {
		if i.ID == "" || i.Container >= len(p.Containers) {
			t.Fatalf("id %+v of %d containers", i, len(p.Containers))
		}
	}
}

func FuzzList(f *testing.F) {
	f.Add(fleet(2))
	f.Add([]byte(`{"kind":"PodList","items":null}`))
	f.Add([]byte(`{"kind":"PodList","items":[null,{}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := New(Config{})
		if err != nil {
			t.Fatal(err)
		}
		pods, _, _, err := p.read(newDecoder(bytes.NewReader(b)))
		for _, q := range pods {
			checkPod(t, q)
		}
		if err != nil {
			if c := causeOf(err); c != "malformed" && c != "unreachable" && c != "too-large" {
				t.Fatalf("%q fails as %s: %v", b, c, err)
			}
		}
	})
}

func FuzzPodBytes(f *testing.F) {
	b, err := full().Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		var w wirePod
		err := decodeProto(b, &w)
		if err != nil {
			if c := causeOf(err); c != "malformed" && c != "too-large" {
				t.Fatalf("%q fails as %s: %v", b, c, err)
			}
			return
		}
		if p, ok := w.keep([]string{"team"}); ok {
			checkPod(t, p)
		}
	})
}

func FuzzFile(f *testing.F) {
	f.Add(sealed(`[{"UID":"x","Namespace":"y","Name":"z"}]`))
	f.Fuzz(func(t *testing.T, b []byte) {
		pods, err := parseFile(b, 10)
		if err == nil && len(pods) > 10 {
			t.Fatalf("%d pods", len(pods))
		}
		pods, err = parseFile(sealed(string(b)), 10)
		for _, p := range pods {
			if err != nil || p.UID == "" {
				t.Fatalf("%q gives %+v, %v", b, p, err)
			}
		}
	})
}
