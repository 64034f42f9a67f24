package kube

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"maps"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/procession-dev/procession/internal/kubeapi"
	"github.com/procession-dev/procession/internal/pki"
)

// Storage keeps a certificate authority's keys in a Secret, and its bundle in
// a ConfigMap that everybody may read.
//
// A Secret that was emptied means a new authority: unlike files on a disk,
// agents learn of the new bundle by themselves. So to remove the Secret's data
// is the way to replace a key that has leaked.
func (c *Client) Storage(secret, bundle Ref) pki.Storage {
	return &storage{c: c, secret: secret, bundle: bundle}
}

type storage struct {
	c              *Client
	secret, bundle Ref
}

// A look is one at both objects.
type look struct {
	*storage
	secretVersion, bundleVersion string
	have                         map[string][]byte // of the Secret
	haveBundle                   []byte            // nil: none
	changes                      map[string]any    // to the Secret; nil removes
	newBundle                    []byte            // nil: no change
}

func (s *storage) Begin() (pki.Files, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*RequestTimeout)
	defer cancel()
	var secret data[[]byte]
	if err := kubeapi.Read(ctx, s.c.rest.Get().AbsPath(kubeapi.Path(s.secret.Namespace, "secrets", s.secret.Name)), &secret); err != nil {
		return nil, explain("Secret", s.secret, err)
	}
	var bundle data[string]
	if err := kubeapi.Read(ctx, s.c.rest.Get().AbsPath(kubeapi.Path(s.bundle.Namespace, "configmaps", s.bundle.Name)), &bundle); err != nil {
		return nil, explain("ConfigMap", s.bundle, err)
	}
	l := &look{storage: s, secretVersion: secret.Metadata.ResourceVersion, bundleVersion: bundle.Metadata.ResourceVersion,
		have: secret.Data, changes: map[string]any{}}
	if l.have == nil {
		l.have = map[string][]byte{}
	}
	if b, ok := bundle.Data[pki.BundleFile]; ok && len(l.have) > 0 {
		l.haveBundle = []byte(b)
	}
	return l, nil
}

func explain(kind string, ref Ref, err error) error {
	switch {
	case apierrors.IsNotFound(err):
		return fmt.Errorf("certificate authority: the %s %v is not there; it is part of the chart: helm upgrade brings it back: %w", kind, ref, err)
	case apierrors.IsForbidden(err):
		return fmt.Errorf("certificate authority: the collector's account may not use the %s %v; the chart's Role allows it: %w", kind, ref, err)
	}
	return fmt.Errorf("certificate authority: %s %v: %w", kind, ref, err)
}

func (l *look) Path(name string) string {
	if name == pki.BundleFile {
		return "ConfigMap " + l.bundle.String() + ", " + name
	}
	return "Secret " + l.secret.String() + ", " + name
}

func (l *look) Read(name string) ([]byte, error) {
	if name == pki.BundleFile {
		if l.newBundle != nil {
			return l.newBundle, nil
		}
		if l.haveBundle != nil {
			return l.haveBundle, nil
		}
	} else if b, ok := l.have[name]; ok {
		return b, nil
	}
	return nil, fmt.Errorf("%s: %w", l.Path(name), fs.ErrNotExist)
}

func (l *look) Write(name string, b []byte) error {
	if name == pki.BundleFile {
		l.newBundle = bytes.Clone(b)
		return nil
	}
	l.have = maps.Clone(l.have)
	l.have[name], l.changes[name] = b, b
	return nil
}

func (l *look) Remove(name string) error {
	l.have = maps.Clone(l.have)
	delete(l.have, name)
	l.changes[name] = nil
	return nil
}

// Commit writes the keys first: a bundle without its key would be trusted for
// nothing, a key without its bundle is published by whoever looks next.
func (l *look) Commit() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*RequestTimeout)
	defer cancel()
	if len(l.changes) > 0 {
		if err := l.c.patch(ctx, "secrets", l.secret, l.secretVersion, l.changes); err != nil {
			return explainWrite("Secret", l.secret, err)
		}
	}
	if l.newBundle != nil {
		keys := map[string]any{pki.BundleFile: string(l.newBundle)}
		if err := l.c.patch(ctx, "configmaps", l.bundle, l.bundleVersion, keys); err != nil {
			return explainWrite("ConfigMap", l.bundle, err)
		}
	}
	return nil
}

func explainWrite(kind string, ref Ref, err error) error {
	if err == pki.ErrConflict {
		return err
	}
	return explain(kind, ref, err)
}

func (l *look) Close() {}
