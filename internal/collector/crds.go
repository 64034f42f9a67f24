package collector

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/procession-dev/procession/internal/collector/kube"
)

const crdsHelp = `collector crds: bring the cluster's custom resource definitions up to date.

  --dir DIR   folder of their YAML files, as in the chart. Required.

It runs in a pod, as the chart's job before each install and upgrade: Helm itself
makes definitions once and never changes them.
`

// applier is what crds asks of a kube.Client.
type applier interface {
	ApplyCRD(ctx context.Context, name string, manifest []byte) error
}

func crds(version string, args []string, stdout io.Writer) error {
	var dir string
	fs := flag.NewFlagSet("crds", flag.ContinueOnError)
	fs.StringVar(&dir, "dir", "", "")
	if err := parse(fs, crdsHelp, args, stdout); err != nil {
		return err
	}
	if dir == "" {
		return usagef("--dir", "is required (collector crds --help)")
	}
	api, err := kube.New("procession-collector/" + version)
	if err != nil {
		return err
	}
	ctx, stop := stopOnSignal()
	defer stop()
	return applyCRDs(ctx, api, dir, stdout)
}

// applyCRDs applies all files of dir, and nothing if one of them is not a
// definition.
func applyCRDs(ctx context.Context, api applier, dir string, stdout io.Writer) error {
	files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil {
		return fmt.Errorf("--dir: %w", err)
	}
	if len(files) == 0 {
		return fmt.Errorf("--dir: %s has no *.yaml", dir)
	}
	names, manifests := make([]string, len(files)), make([][]byte, len(files))
	for i, file := range files {
		if names[i], manifests[i], err = readCRD(file); err != nil {
			return err
		}
	}
	for i, name := range names {
		if err := applyPatiently(ctx, api, name, manifests[i]); err != nil {
			return err
		}
		fmt.Fprintf(stdout, "%s is as this version needs it\n", name)
	}
	return nil
}

// applyPatiently tries again for a while: an upgrade of the cluster itself is
// when API servers are away for a moment.
func applyPatiently(ctx context.Context, api applier, name string, manifest []byte) error {
	for pause := time.Second; ; pause *= 2 {
		err := api.ApplyCRD(ctx, name, manifest)
		if err == nil || pause > 16*time.Second {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(pause):
		}
	}
}

func readCRD(file string) (name string, manifest []byte, err error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", nil, err
	}
	var crd struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Metadata   struct {
			Name string `json:"name"`
		} `json:"metadata"`
	}
	if err := yaml.Unmarshal(b, &crd); err != nil {
		return "", nil, fmt.Errorf("%s: %w", file, err)
	}
	if crd.APIVersion != "apiextensions.k8s.io/v1" || crd.Kind != "CustomResourceDefinition" || crd.Metadata.Name == "" {
		return "", nil, fmt.Errorf("%s is no CustomResourceDefinition of apiextensions.k8s.io/v1", file)
	}
	manifest, err = yaml.YAMLToJSON(b)
	if err != nil {
		return "", nil, fmt.Errorf("%s: %w", file, err)
	}
	return crd.Metadata.Name, manifest, nil
}
