package chart

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"

	"github.com/procession-dev/procession/internal/policy"
)

const dir = "../../deploy/helm/procession"

var load = sync.OnceValues(func() (*chart.Chart, error) { return loader.Load(dir) })

// A cluster is what the chart may look up.
type cluster []runtime.Object

func (c cluster) GetClientFor(apiVersion, kind string) (dynamic.NamespaceableResourceInterface, bool, error) {
	gv, err := schema.ParseGroupVersion(apiVersion)
	if err != nil {
		return nil, false, err
	}
	resource := map[string]string{"StorageClass": "storageclasses", "StatefulSet": "statefulsets"}[kind]
	if resource == "" {
		return nil, false, fmt.Errorf("the chart looks up a %s", kind)
	}
	client := fake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{gv.WithResource(resource): kind + "List"}, c...)
	return client.Resource(gv.WithResource(resource)), kind == "StatefulSet", nil
}

// render gives the files of the chart for values in YAML.
func render(values, version string, c cluster) (map[string]string, error) {
	ch, err := load()
	if err != nil {
		return nil, err
	}
	v, err := chartutil.ReadValues([]byte(values))
	if err != nil {
		return nil, err
	}
	kube, err := chartutil.ParseKubeVersion(version)
	if err != nil {
		return nil, err
	}
	all, err := chartutil.ToRenderValues(ch, v, chartutil.ReleaseOptions{Name: "procession", Namespace: "procession-system", Revision: 1, IsInstall: true},
		&chartutil.Capabilities{KubeVersion: *kube, APIVersions: chartutil.DefaultVersionSet})
	if err != nil {
		return nil, err
	}
	files, err := engine.RenderWithClientProvider(ch, all, c)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for name, text := range files {
		out[strings.TrimPrefix(name, "procession/templates/")] = text
	}
	return out, nil
}

func mustRender(t *testing.T, values, version string, c cluster) map[string]string {
	t.Helper()
	files, err := render(values, version, c)
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// objects decodes everything that was rendered as strictly as an API server
// that is asked to: a field that is not known, or stands there twice, fails.
func objects(t *testing.T, files map[string]string) []runtime.Object {
	t.Helper()
	strict := json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme.Scheme, scheme.Scheme, json.SerializerOptions{Yaml: true, Strict: true})
	var all []runtime.Object
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if filepath.Ext(name) != ".yaml" {
			continue
		}
		for i, doc := range strings.Split("\n"+files[name], "\n---") {
			var kind metav1.TypeMeta
			if err := yaml.Unmarshal([]byte(doc), &kind); err != nil {
				t.Fatalf("%s, document %d: %v\n%s", name, i, err, doc)
			}
			switch {
			case kind.Kind == "": // nothing but comments
				continue
			case kind.Kind == "ClusterDetectionPolicy":
				if _, err := policy.Parse(name, []byte(doc)); err != nil {
					t.Errorf("%s, document %d: %v", name, i, err)
				}
				continue
			}
			o, _, err := strict.Decode([]byte(doc), nil, nil)
			if err != nil {
				t.Errorf("%s, document %d: %v\n%s", name, i, err, doc)
				continue
			}
			all = append(all, o)
		}
	}
	return all
}

func find[T runtime.Object](t *testing.T, all []runtime.Object, name string) T {
	t.Helper()
	for _, o := range all {
		if got, ok := o.(T); ok && o.(metav1.Object).GetName() == name {
			return got
		}
	}
	var none T
	t.Fatalf("no %T %s", none, name)
	return none
}

// values is the matrix: each at each version of Kubernetes.
var values = map[string]string{
	"defaults":       "",
	"pod network":    "agent: {hostNetwork: false}",
	"fewest":         "agent: {capabilities: {NET_ADMIN: false, BPF: false, PERFMON: false, SYS_PTRACE: false, DAC_READ_SEARCH: false, SYS_NICE: false}}",
	"pods from API":  "agent: {pods: {kubeletPort: 0, apiWatch: true, annotations: [team, tier]}}",
	"kubelet CA":     "agent: {pods: {kubeletCA: /var/lib/kubelet/pki/kubelet.crt, kubeletServerName: node}}",
	"labels":         "agent: {namespaceLabels: true, nodeLabels: true}",
	"kept":           "collector: {keepTime: 24h, keepBytes: 2147483648}",
	"local seccomp":  "agent: {seccompProfile: {type: Localhost, localhostProfile: procession.json}}",
	"all addresses":  "agent: {metricsAddress: '0.0.0.0:9465'}",
	"IPv6 address":   "agent: {metricsAddress: '[::1]:9465'}",
	"volume":         "collector: {persistence: {enabled: true, storageClassName: fast, whenDeleted: Delete}}",
	"database":       "collector: {replicas: 3, database: {secretName: pg}}",
	"sinks":          "collector: {sinks: [{name: soc, webhook: {url: 'https://soc.example'}}]}",
	"sinks' Secret":  "collector: {sinksSecret: soc}",
	"certificates":   "collector: {auth: {certificates: true, audience: x, tokenSeconds: 3600, tokenGrace: 10m, podLookup: true}}",
	"no alerts":      "collector: {alertsInLog: false}",
	"guarded":        "collector: {networkPolicy: {agentCIDRs: [10.0.0.0/8, 'fd00::/8'], metricsFrom: [{namespaceSelector: {}}]}}",
	"unguarded":      "collector: {networkPolicy: {enabled: false}, podDisruptionBudget: {enabled: false}}",
	"names":          "{nameOverride: watch, imagePullSecrets: [{name: regcred}]}",
	"full name":      "fullnameOverride: very-long-name-that-goes-on-and-on-and-on-until-it-is-cut-somewhere",
	"digests":        "{agent: {image: {digest: 'sha256:" + digest + "'}}, collector: {image: {digest: 'sha256:" + digest + "', tag: v1}}}",
	"no pack":        "policies: {starter: false, namespaceAdmins: false, status: false}",
	"dry run":        "policies: {mode: DryRun, exclude: [host]}",
	"own class":      "agent: {priorityClassName: system-node-critical}",
	"no class":       "priorityClass: {create: false}",
	"no upgrade job": "crds: {upgradeJob: false}",
	"placed": `
agent: {tolerations: [], nodeSelector: {a: b}, affinity: {nodeAffinity: {}}, podLabels: {x: z}, podAnnotations: {x: z}, extraArgs: [--drain=20ms], extraEnv: [{name: GOGC, value: "50"}]}
collector: {tolerations: [{operator: Exists}], nodeSelector: {a: b}, affinity: {podAntiAffinity: {}}, podLabels: {x: z}, podAnnotations: {x: z}, extraArgs: [--ndjson=/var/lib/procession/a.ndjson], extraEnv: [{name: GOGC, value: "50"}], priorityClassName: high, service: {port: 8443, clusterIP: 10.96.0.77}}`,
}

const digest = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

var versions = []string{"v1.25.0", "v1.29.4-gke.1", "v1.32.0", "v1.36.3", "v1.37.2"}

// Each combination of values and versions is something that an API server
// takes, whose parts find each other, and that asks for no more than it says.
func TestMatrix(t *testing.T) {
	for _, name := range slices.Sorted(maps.Keys(values)) {
		for _, version := range versions {
			t.Run(name+"/"+version, func(t *testing.T) {
				all := objects(t, mustRender(t, values[name], version, nil))
				for _, o := range all {
					checkObject(t, o)
				}
				checkReferences(t, all)
				checkPrivileges(t, all, strings.Contains(values[name], "hostNetwork: false"))
			})
		}
	}
}

func checkObject(t *testing.T, o runtime.Object) {
	t.Helper()
	m := o.(metav1.Object)
	if len(m.GetName()) > 63 || m.GetName() == "" {
		t.Errorf("%T: the name %q has %d bytes", o, m.GetName(), len(m.GetName()))
	}
	if m.GetLabels()["app.kubernetes.io/instance"] != "procession" {
		t.Errorf("%T %s: labels %v", o, m.GetName(), m.GetLabels())
	}
	_, clusterwide := map[string]bool{"ClusterRole": true, "ClusterRoleBinding": true, "PriorityClass": true}[o.GetObjectKind().GroupVersionKind().Kind]
	if clusterwide != (m.GetNamespace() == "") {
		t.Errorf("%T %s: namespace %q", o, m.GetName(), m.GetNamespace())
	}
}

type workload struct {
	name     string
	selector *metav1.LabelSelector
	template *corev1.PodTemplateSpec
	claims   []corev1.PersistentVolumeClaim
}

func workloads(all []runtime.Object) (ws []workload) {
	for _, o := range all {
		switch o := o.(type) {
		case *appsv1.DaemonSet:
			ws = append(ws, workload{o.Name, o.Spec.Selector, &o.Spec.Template, nil})
		case *appsv1.StatefulSet:
			ws = append(ws, workload{o.Name, o.Spec.Selector, &o.Spec.Template, o.Spec.VolumeClaimTemplates})
		case *batchv1.Job:
			ws = append(ws, workload{o.Name, nil, &o.Spec.Template, nil})
		}
	}
	return ws
}

// elsewhere is what the values above take for granted.
var elsewhere = map[string]bool{"Secret pg": true, "Secret soc": true, "ConfigMap kube-root-ca.crt": true}

// checkReferences checks that whatever is named is there.
func checkReferences(t *testing.T, all []runtime.Object) {
	t.Helper()
	have := maps.Clone(elsewhere)
	for _, o := range all {
		have[o.GetObjectKind().GroupVersionKind().Kind+" "+o.(metav1.Object).GetName()] = true
	}
	need := func(who, what string) {
		if !have[what] {
			t.Errorf("%s names the %s, which is not there", who, what)
		}
	}
	for _, w := range workloads(all) {
		spec := w.template.Spec
		need(w.name, "ServiceAccount "+spec.ServiceAccountName)
		if w.selector != nil {
			for k, v := range w.selector.MatchLabels {
				if w.template.Labels[k] != v {
					t.Errorf("%s selects %s=%s, its pods have %v", w.name, k, v, w.template.Labels)
				}
			}
		}
		volumes := map[string]bool{}
		for _, c := range w.claims {
			volumes[c.Name] = true
		}
		for _, v := range spec.Volumes {
			if volumes[v.Name] {
				t.Errorf("%s has the volume %s twice", w.name, v.Name)
			}
			volumes[v.Name] = true
			if v.Secret != nil {
				need(w.name, "Secret "+v.Secret.SecretName)
			}
			if v.ConfigMap != nil {
				need(w.name, "ConfigMap "+v.ConfigMap.Name)
			}
		}
		for _, m := range spec.Containers[0].VolumeMounts {
			if !volumes[m.Name] {
				t.Errorf("%s mounts %s, which is no volume", w.name, m.Name)
			}
			delete(volumes, m.Name)
		}
		if len(volumes) > 0 {
			t.Errorf("%s does not mount %v", w.name, slices.Collect(maps.Keys(volumes)))
		}
	}
	for _, o := range all {
		switch o := o.(type) {
		case *rbacv1.RoleBinding:
			need(o.Name, "Role "+o.RoleRef.Name)
			need(o.Name, "ServiceAccount "+o.Subjects[0].Name)
		case *rbacv1.ClusterRoleBinding:
			need(o.Name, "ClusterRole "+o.RoleRef.Name)
			need(o.Name, "ServiceAccount "+o.Subjects[0].Name)
		case *rbacv1.Role:
			for _, r := range o.Rules {
				for _, n := range r.ResourceNames {
					need(o.Name, map[string]string{"secrets": "Secret ", "configmaps": "ConfigMap "}[r.Resources[0]]+n)
				}
			}
		case *appsv1.StatefulSet:
			need(o.Name, "Service "+o.Spec.ServiceName)
		case *networkingv1.NetworkPolicy:
			for _, in := range o.Spec.Ingress {
				for _, p := range in.Ports {
					if n := p.Port.String(); n != "agents" && n != "metrics" {
						t.Errorf("%s names the port %s", o.Name, n)
					}
				}
			}
		}
	}
}

// mayRead is everything that any account may do, as verbs on resources; with
// the names if only some.
var mayRead = map[string][]string{
	"procession-agent": {"get,list,watch clusterdetectionpolicies", "get,list,watch detectionpolicies", "get nodes/pods",
		"list,watch pods", "list,watch namespaces", "get nodes", "get configmaps [procession-ca]"},
	"procession-collector": {"create tokenreviews", "get,patch secrets [procession-ca-key]", "get,patch configmaps [procession-ca]", "get pods",
		"list,watch clusterdetectionpolicies", "list,watch detectionpolicies", "patch clusterdetectionpolicies/status", "patch detectionpolicies/status"},
	"procession-crds":  {"get,patch customresourcedefinitions [clusterdetectionpolicies.procession.dev detectionpolicies.procession.dev]"},
	"procession-view":  {"get,list,watch detectionpolicies"},
	"procession-admin": {"create,update,patch,delete,deletecollection detectionpolicies"},
}

// checkPrivileges holds what pods and accounts may do against what is promised.
func checkPrivileges(t *testing.T, all []runtime.Object, podNetwork bool) {
	t.Helper()
	for _, w := range workloads(all) {
		c := w.template.Spec.Containers[0]
		s := c.SecurityContext
		if *s.Privileged || *s.AllowPrivilegeEscalation || !*s.ReadOnlyRootFilesystem || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) {
			t.Errorf("%s: %+v", w.name, s)
		}
		if c.Resources.Limits.Memory().IsZero() || c.Resources.Requests.Cpu().IsZero() || !c.Resources.Limits.Cpu().IsZero() {
			t.Errorf("%s: resources %+v", w.name, c.Resources)
		}
		agent := strings.HasSuffix(w.name, "-agent")
		allowed := []corev1.Capability{}
		if agent {
			allowed = []corev1.Capability{"NET_ADMIN", "BPF", "PERFMON", "SYS_PTRACE", "DAC_READ_SEARCH", "SYS_NICE"}
			if podNetwork {
				allowed = append(allowed, "SYS_ADMIN")
			}
		}
		for _, have := range s.Capabilities.Add {
			if !slices.Contains(allowed, have) {
				t.Errorf("%s has the capability %s", w.name, have)
			}
		}
		p := w.template.Spec
		if p.HostPID != agent || p.HostNetwork != (agent && !podNetwork) || p.HostIPC {
			t.Errorf("%s: hostPID %v, hostNetwork %v, hostIPC %v", w.name, p.HostPID, p.HostNetwork, p.HostIPC)
		}
		if !agent && (p.SecurityContext.RunAsNonRoot == nil || !*p.SecurityContext.RunAsNonRoot || p.SecurityContext.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault) {
			t.Errorf("%s: %+v", w.name, p.SecurityContext)
		}
		if agent && (p.AutomountServiceAccountToken == nil || *p.AutomountServiceAccountToken) {
			t.Errorf("%s mounts a token for everything", w.name)
		}
		for _, v := range p.Volumes {
			if v.HostPath != nil && (!agent || v.HostPath.Path == "/" || strings.Contains(v.HostPath.Path, ".sock")) {
				t.Errorf("%s mounts %s of the host", w.name, v.HostPath.Path)
			}
		}
	}
	for _, o := range all {
		var name string
		var rules []rbacv1.PolicyRule
		switch o := o.(type) {
		case *rbacv1.Role:
			name, rules = o.Name, o.Rules
		case *rbacv1.ClusterRole:
			name, rules = o.Name, o.Rules
		}
		suffix := name[strings.LastIndexByte(name, '-')+1:]
		full := strings.TrimSuffix(name, "-"+suffix)
		for _, r := range rules {
			for _, res := range r.Resources {
				can := strings.Join(r.Verbs, ",") + " " + res
				if len(r.ResourceNames) > 0 {
					can += fmt.Sprintf(" %v", r.ResourceNames)
				}
				can = strings.ReplaceAll(can, "["+full, "[procession")
				if !slices.Contains(mayRead["procession-"+suffix], can) {
					t.Errorf("%s may %q", name, can)
				}
			}
		}
	}
}

// The upgrade job may change each definition there is, and brings it along.
func TestUpgradeJob(t *testing.T) {
	all := objects(t, mustRender(t, "", "v1.36.3", nil))
	role, brought := find[*rbacv1.ClusterRole](t, all, "procession-crds"), find[*corev1.ConfigMap](t, all, "procession-crds")
	files, err := filepath.Glob(dir + "/crds/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no definitions: %v", err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var crd struct{ Metadata metav1.ObjectMeta }
		if err := yaml.Unmarshal(text, &crd); err != nil {
			t.Fatal(err)
		}
		if !slices.Contains(role.Rules[0].ResourceNames, crd.Metadata.Name) {
			t.Errorf("the job may not change %s", crd.Metadata.Name)
		}
		if strings.TrimSpace(brought.Data[filepath.Base(file)]) != strings.TrimSpace(string(text)) {
			t.Errorf("the job brings another %s", filepath.Base(file))
		}
	}
}

// What depends on the cluster's version or on what it has.
func TestDepends(t *testing.T) {
	agentOf := func(all []runtime.Object) *appsv1.DaemonSet {
		return find[*appsv1.DaemonSet](t, all, "procession-agent")
	}
	collectorOf := func(all []runtime.Object) *appsv1.StatefulSet {
		return find[*appsv1.StatefulSet](t, all, "procession-collector")
	}
	for version, lookup := range map[string]bool{"v1.29.0": true, "v1.30.0": false, "v1.36.3": false} {
		all := objects(t, mustRender(t, "", version, nil))
		if got := slices.Contains(collectorOf(all).Spec.Template.Spec.Containers[0].Args, "--pod-lookup"); got != lookup {
			t.Errorf("%s: pod lookup %v", version, got)
		}
	}
	for version, socket := range map[string]bool{"v1.36.3": false, "v1.37.0": true} {
		got := false
		for _, v := range agentOf(objects(t, mustRender(t, "", version, nil))).Spec.Template.Spec.Volumes {
			got = got || v.Name == "pods-api"
		}
		if got != socket {
			t.Errorf("%s: the Pods API is mounted: %v", version, got)
		}
	}
	class := func(isDefault string) runtime.Object {
		return &unstructured.Unstructured{Object: map[string]any{"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass",
			"metadata": map[string]any{"name": "c" + isDefault, "annotations": map[string]any{"storageclass.kubernetes.io/is-default-class": isDefault}}}}
	}
	set := func(claims bool) runtime.Object {
		spec := map[string]any{"serviceName": "x"}
		if claims {
			spec["volumeClaimTemplates"] = []any{map[string]any{"metadata": map[string]any{"name": "state"}}}
		}
		return &unstructured.Unstructured{Object: map[string]any{"apiVersion": "apps/v1", "kind": "StatefulSet",
			"metadata": map[string]any{"name": "procession-collector", "namespace": "procession-system"}, "spec": spec}}
	}
	for _, tt := range []struct {
		name    string
		values  string
		c       cluster
		volume  bool
		warning bool
	}{
		{"nothing", "", nil, false, true},
		{"a class that is not the default", "", cluster{class("false")}, false, true},
		{"a default class", "", cluster{class("false"), class("true")}, true, false},
		{"never", "collector: {persistence: {enabled: false}}", cluster{class("true")}, false, true},
		{"always", "collector: {persistence: {enabled: true}}", nil, true, false},
		{"installed without, a class came later", "", cluster{class("true"), set(false)}, false, true},
		{"installed with, the class went", "", cluster{set(true)}, true, false},
		{"a named class", "collector: {persistence: {storageClassName: fast}}", nil, true, false},
		{"a database", "collector: {database: {secretName: pg}}", cluster{class("true")}, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			files := mustRender(t, tt.values, "v1.36.3", tt.c)
			c := collectorOf(objects(t, files))
			if got := len(c.Spec.VolumeClaimTemplates) > 0; got != tt.volume {
				t.Errorf("a volume: %v, want %v", got, tt.volume)
			}
			if got := strings.Contains(files["NOTES.txt"], "WARNING: the collector stores alerts in an emptyDir"); got != tt.warning {
				t.Errorf("warned: %v, want %v:\n%s", got, tt.warning, files["NOTES.txt"])
			}
			if got := slices.Contains(c.Spec.Template.Spec.Containers[0].Args, "--ephemeral"); got != tt.warning {
				t.Errorf("told to the collector: %v, want %v", got, tt.warning)
			}
		})
	}
}

// Typos and values that cannot be are refused by name.
func TestRefused(t *testing.T) {
	for _, tt := range []struct{ values, want string }{
		{"agent: {hostnetwork: true}", "hostnetwork"},
		{"agent: {image: {tga: x}}", "tga"},
		{"colector: {}", "colector"},
		{"agent: {capabilities: {SYS_ADMIN: true}}", "SYS_ADMIN"},
		{"agent: {recorder: maybe}", "/agent/recorder"},
		{"agent: {stateDir: var/lib}", "/agent/stateDir"},
		{"agent: {spoolBytes: 10}", "/agent/spoolBytes"},
		{"agent: {metricsAddress: '9465'}", "/agent/metricsAddress"},
		{"agent: {maxUnavailable: 0}", "/agent/maxUnavailable"},
		{"agent: {resources: {limit: {}}}", "limit"},
		{"collector: {persistence: {enabled: perhaps}}", "/collector/persistence/enabled"},
		{"collector: {persistence: {size: 10}}", "/collector/persistence/size"},
		{"collector: {auth: {tokenSeconds: 60}}", "/collector/auth/tokenSeconds"},
		{"collector: {auth: {tokenGrace: long}}", "/collector/auth/tokenGrace"},
		{"collector: {service: {port: 0}}", "/collector/service/port"},
		{"collector: {replicas: 2}", "needs a database that they share"},
		{"policies: {mode: dryrun}", "/policies/mode"},
		{"policies: {exclude: [nothing]}", `"nothing" is no policy of the starter pack`},
		{"clusterName: a/b", "/clusterName"},
		{"priorityClass: {value: 2000000000}", "/priorityClass/value"},
	} {
		if _, err := render(tt.values, "v1.36.3", nil); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.values, err, tt.want)
		}
	}
}

func TestLint(t *testing.T) {
	kube, err := chartutil.ParseKubeVersion("v1.36.3")
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range values {
		v, err := chartutil.ReadValues([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range lint.AllWithKubeVersion(dir, v, "procession-system", kube).Messages {
			if m.Severity > support.InfoSev {
				t.Errorf("%s: %v", name, m)
			}
		}
	}
}

// Flags that the chart gives are flags that the programs have.
func TestFlags(t *testing.T) {
	bin := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-o", bin, "./cmd/agent", "./cmd/collector")
	build.Dir, build.Env = "../..", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for name, v := range values {
		for _, w := range workloads(objects(t, mustRender(t, v, "v1.36.3", nil))) {
			c := w.template.Spec.Containers[0]
			// Help is printed when everything before it could be read.
			cmd := exec.CommandContext(t.Context(), filepath.Join(bin, map[string]string{"agent": "agent"}[c.Name]), append(slices.Clone(c.Args), "--help")...)
			if c.Name != "agent" {
				cmd.Path = filepath.Join(bin, "collector")
			}
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Run(); err != nil {
				t.Errorf("%s: %s %q: %v\n%s", name, w.name, c.Args, err, out.String())
			}
		}
	}
}
