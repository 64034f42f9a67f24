package cgroup

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/procfs"
)

// The ids in testdata.
const (
	id      = "a1b593bf9cc763afec7eb11e89f53d4d533b13fc883b230ddb4492b07cb2036f"
	id2     = "8409c0de5f633bfb02fb3456788b6f9eb691f3de63b1fe964d5e13614f569729"
	nodeID  = "86a0db48a16a49ceb6c786c3ecced740c086517738daca8229c892cf8ecfa824"
	uid     = "1fc8cbb1-1d73-41f8-a9ba-825cb32d14b2"
	uid2    = "fe541ac9-403b-452d-94df-674a9282d02d"
	hash    = "d3b9c81f816480f0c28eb564608ff695"
	mesosID = "0ba5b8ac-7e3c-44a0-8a3f-3c4bcb0c9a6b"
)

func container(runtime string) Info { return Info{Kind: Container, ContainerID: id, Runtime: runtime} }

func named(name, runtime string) Info {
	return Info{Kind: Container, ContainerID: name, Runtime: runtime}
}

func pod(runtime string) Info {
	return Info{Kind: Container, ContainerID: id, Runtime: runtime, PodUID: uid}
}

func static(runtime string) Info {
	return Info{Kind: Container, ContainerID: id, Runtime: runtime, PodUID: hash}
}

func node() Info { return Info{Kind: Node, Of: nodeID, Runtime: "docker"} }

func up(i Info, n int) Info { i.Up = n; return i }

func rootless(i Info) Info { i.Rootless, i.Owner = true, 1000; return i }

// files is what each directory of testdata is. Bad input first.
var files = map[string]Info{
	"attack-pod-names-a-pod-below-itself":       pod(""),
	"attack-pod-names-itself-a-service":         pod("containerd"),
	"attack-pod-names-itself-conmon":            pod(""),
	"attack-container-names-itself-conmon":      container("docker"),
	"attack-container-names-itself-lxc-monitor": container("docker"),
	"attack-user-names-a-pod":                   {Kind: Container, ContainerID: id2, Rootless: true, Owner: 1000},
	"attack-dind-inside-a-pod":                  pod(""),
	"attack-escaped-slash":                      {Kind: Host},
	"attack-moved-in-one-hierarchy":             pod(""), // the memory controller's, as in the recorder; the move is root's alone
	"attack-moved-between-containers":           container("docker"),
	"malformed-line":                            {Kind: Unknown},
	"id-too-long":                               {Kind: Host},
	"id-with-another-digit-before":              {Kind: Host},
	"id-with-letter-behind":                     {Kind: Host},
	"id-in-upper-case":                          {Kind: Host},
	"hierarchy-gone":                            {Kind: Unknown},
	"zombie-v1":                                 {Kind: Root},
	"root-of-a-namespace":                       {Kind: Root},
	"removed-cgroup-of-a-zombie":                pod("containerd"),
	"private-cgroupns-root-or-between":          {Kind: Unknown, Up: 3},
	"private-cgroupns-unknown-cgroup":           {Kind: Unknown, Up: 1},
	"private-cgroupns-same-pod-crio":            up(container("cri-o"), 1),
	"private-cgroupns-same-pod-cgroupfs":        up(container(""), 1),
	"private-cgroupns-sibling-docker":           up(container("docker"), 1),
	"private-cgroupns-same-qos":                 up(pod("containerd"), 2),
	"private-cgroupns-other-qos":                {Kind: Container, ContainerID: id2, Runtime: "containerd", PodUID: uid2, Up: 3},
	"private-cgroupns-guaranteed":               up(pod("containerd"), 3),
	"private-cgroupns-kind":                     up(pod("containerd"), 2),
	"private-cgroupns-cgroupfs":                 up(pod(""), 2),
	"private-cgroupns-host-service":             {Kind: Host, Up: 4},
	"docker-bare-id":                            container(""),
	"docker-cgroupfs-v1":                        container("docker"),
	"docker-cgroupfs-v2":                        container("docker"),
	"docker-subgroup-ns":                        container("docker"),
	"docker-subgroup-any":                       container("docker"),
	"docker-in-docker-v1":                       container("docker"),
	"docker-systemd":                            container("docker"),
	"docker-systemd-init":                       container("docker"),
	"docker-slice":                              container("docker"),
	"docker-custom-parent":                      container("docker"),
	"docker-pod":                                pod(""),
	"systemd-inside-docker":                     container("docker"),
	"scope-without-prefix":                      container(""),
	"github-runner":                             container(""),
	"nerdctl":                                   container("containerd"),
	"kind-pod-v1":                               pod(""),
	"kind-pod-v1-some-lines-are-the-nodes":      pod(""),
	"kind-node-containerd-v1":                   node(),
	"kind-node-containerd-doubled":              node(),
	"kind-node-kubelet-v2":                      node(),
	"kind-node-init-v2":                         {Kind: Container, ContainerID: nodeID, Runtime: "docker"},
	"kind-static-pod-v2":                        static(""),
	"kind-guaranteed-v2":                        pod(""),
	"kind-besteffort-v2":                        pod(""),
	"kind-systemd-guaranteed":                   pod("containerd"),
	"kind-systemd-besteffort":                   pod("containerd"),
	"kind-on-podman":                            pod("containerd"),
	"minikube-docker":                           pod("docker"),
	"kubepods-besteffort-v1":                    pod(""),
	"kubepods-burstable":                        pod(""),
	"kubepods-guaranteed-v1":                    pod(""),
	"kubepods-doubled":                          pod(""),
	"kubepods-container-without-pod":            container(""),
	"static-pod-cgroupfs":                       static(""),
	"openshift-static-pod":                      static("cri-o"),
	"pod-level":                                 {Kind: Pod, PodUID: uid},
	"pod-level-static":                          {Kind: Pod, PodUID: hash},
	"pod-level-systemd":                         {Kind: Pod, PodUID: uid},
	"qos-level":                                 {Kind: Host},
	"process-made-subgroup":                     pod(""),
	"crio-cgroupfs":                             pod("cri-o"),
	"crio-conmon":                               {Kind: Monitor, Of: id, Runtime: "cri-o"},
	"crun-subgroup":                             pod("cri-o"),
	"crun-subgroup-cgroupfs":                    pod("cri-o"),
	"systemd-docker":                            pod("docker"),
	"systemd-cri-containerd":                    pod("containerd"),
	"systemd-crio":                              pod("cri-o"),
	"systemd-guaranteed":                        pod("containerd"),
	"systemd-slice-keeps-dashes":                pod("docker"),
	"systemd-notation-under-cgroupfs":           pod("containerd"),
	"systemd-notation-static-pod":               static("containerd"),
	"systemd-notation-below-containerd":         pod("containerd"),
	"systemd-notation-below-podruntime":         pod("containerd"),
	"systemd-notation-mixed-lines":              pod("containerd"),
	"podman-root":                               container("podman"),
	"podman-root-crun":                          container("podman"),
	"podman-conmon":                             {Kind: Monitor, Of: id, Runtime: "podman"},
	"podman-cgroupfs":                           container("podman"),
	"podman-cgroupfs-conmon":                    {Kind: Monitor, Runtime: "podman"},
	"podman-rootless":                           rootless(container("podman")),
	"podman-rootless-no-scope":                  rootless(container("podman")),
	"podman-rootless-libpod":                    rootless(container("podman")),
	"podman-split-ceph":                         container("podman"),
	"podman-split-ceph-scope":                   container("podman"),
	"podman-healthcheck-service":                {Kind: Host},
	"ctr-default":                               named("web.1", "containerd"),
	"ctr-k8s-namespace":                         named("my-test_container", "containerd"),
	"ctr-subgroup":                              named("web.1", "containerd"),
	"ctr-own-namespace":                         {Kind: Container, ContainerID: "web", Runtime: "containerd", Guess: true},
	"two-units-are-no-ctr":                      {Kind: Host},
	"garden":                                    named("fc6c9886-cd3d-4d87-5053-c102", "garden"),
	"bpm":                                       named("nats", "bpm"),
	"lxc":                                       named("web-1", "lxc"),
	"lxc-payload":                               named("web-1", "lxc"),
	"lxc-payload-systemd":                       named("web-1", "lxc"),
	"lxc-monitor":                               {Kind: Monitor, Of: "web-1", Runtime: "lxc"},
	"kubernetes-in-lxc":                         pod("containerd"),
	"libvirt-lxc-machine":                       named("libvirt-container", "libvirt-lxc"),
	"libvirt-lxc-suffix":                        named("web", "libvirt-lxc"),
	"libvirt-lxc-path":                          named("web", "libvirt-lxc"),
	"qemu-is-no-container":                      {Kind: Host},
	"mesos-pod":                                 pod(""),
	"mesos":                                     named(mesosID, "mesos"),
	"buildkit":                                  named("rllo4ffqtyb9exmq5dj9yqpvg", "buildkit"),
	"host-user-slice":                           {Kind: Host},
	"host-user-service":                         {Kind: Host},
	"host-session-v1":                           {Kind: Host},
	"host-init":                                 {Kind: Host},
	"host-service":                              {Kind: Host},
	"host-service-v1":                           {Kind: Host},
}

// TestFiles takes whole files of /proc/PID/cgroup the way they go in the agent:
// one path of them is chosen, as the recorder does in the kernel, and parsed.
func TestFiles(t *testing.T) {
	dirs, err := os.ReadDir("testdata")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, d := range dirs {
		if d.Name() == "fuzz" {
			continue
		}
		n++
		t.Run(d.Name(), func(t *testing.T) {
			content, err := os.ReadFile(filepath.Join("testdata", d.Name(), "proc", "4711", "cgroup"))
			if err != nil {
				t.Fatal(err)
			}
			want, ok := files[d.Name()]
			if !ok {
				t.Fatal("the table has no row for this directory")
			}
			path, _ := procfs.ParseCgroup(content)
			if diff := cmp.Diff(want, Parse(string(path))); diff != "" {
				t.Errorf("%s(-want +got):\n%s", content, diff)
			}
		})
	}
	if n != len(files) {
		t.Errorf("%d directories in testdata, %d rows in the table", n, len(files))
	}
}

func TestParseRejects(t *testing.T) {
	for _, path := range []string{"", "relative/path", " (deleted)", "..", "docker/" + id} {
		if got := Parse(path); got != (Info{}) {
			t.Errorf("Parse(%q) = %+v, want nothing", path, got)
		}
	}
	// A name with a control character, a space or half a kilobyte is nobody's.
	for _, name := range []string{"a\x1b[2J", "a b", strings.Repeat("x", 500), "-rf", ".hidden", "\xff"} {
		for _, path := range []string{"/lxc/" + name, "/default/" + name, "/lxc.payload." + name, "/garden/" + name} {
			if got := Parse(path); got.Kind == Container {
				t.Errorf("Parse(%.60q) = %+v, want no container", path, got)
			}
		}
	}
}

func TestParseAllocatesNothing(t *testing.T) {
	path := "/kubepods/besteffort/pod" + uid + "/" + id
	if n := testing.AllocsPerRun(1000, func() { Parse(path) }); n != 0 {
		t.Errorf("Parse allocates %v times", n)
	}
}

func BenchmarkParse(b *testing.B) {
	for name, path := range map[string]string{
		"cgroupfs": "/kubepods/besteffort/pod" + uid + "/" + id,
		"systemd": "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + strings.ReplaceAll(uid, "-", "_") +
			".slice/cri-containerd-" + id + ".scope",
		"host": "/system.slice/ssh.service",
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				Parse(path)
			}
		})
	}
}

func seeds(f *testing.F, add func([]byte)) {
	paths, err := filepath.Glob("testdata/*/proc/*/cgroup")
	if err != nil || len(paths) == 0 {
		f.Fatal("no seeds", err)
	}
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			f.Fatal(err)
		}
		add(b)
	}
}

// checkInfo holds what any answer promises, whatever the path was.
func checkInfo(t *testing.T, in string, i Info) {
	t.Helper()
	switch {
	case (i.Kind == Container) != (i.ContainerID != ""),
		i.PodUID != "" && i.Kind != Container && i.Kind != Pod,
		i.Kind == Pod && i.PodUID == "",
		i.Of != "" && i.Kind != Monitor && i.Kind != Node,
		i.Rootless && i.PodUID != "",
		i.Guess && i.Kind != Container,
		i.Kind == Root && i.Up != 0:
		t.Fatalf("%q gives inconsistent %+v", in, i)
	case i.PodUID != "" && !isHex(i.PodUID, hashLen) && (len(i.PodUID) != uuidLen || !isUUID(i.PodUID) || i.PodUID[8] != '-'):
		t.Fatalf("%q gives pod uid %q", in, i.PodUID)
	case i.ContainerID != "" && !isHex(i.ContainerID, idLen) && !validName(i.ContainerID):
		t.Fatalf("%q gives container id %q", in, i.ContainerID)
	}
}

func FuzzParse(f *testing.F) {
	seeds(f, func(b []byte) {
		line, _, _ := strings.Cut(string(b), "\n")
		if p := strings.SplitN(line, ":", 3); len(p) == 3 {
			f.Add(p[2], "x")
		}
	})
	f.Fuzz(func(t *testing.T, path, below string) {
		i := Parse(path)
		checkInfo(t, path, i)
		// Nothing a workload writes below its pod's container changes who it is.
		if i.PodUID != "" && i.Kind == Container && !strings.HasSuffix(path, " (deleted)") {
			if j := Parse(path + "/" + below); j != i {
				t.Fatalf("%q is %+v, but with %q below it is %+v", path, i, below, j)
			}
		}
		// Nor does a container become the host.
		if i.Kind == Container && isHex(i.ContainerID, idLen) && !strings.HasSuffix(path, " (deleted)") {
			if j := Parse(path + "/" + below); j.Kind != Container && j.Kind != Node {
				t.Fatalf("%q is %+v, but with %q below it is %+v", path, i, below, j)
			}
		}
	})
}
