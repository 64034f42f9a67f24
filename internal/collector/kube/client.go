// Package kube is what the collector asks of a Kubernetes API server: whom a
// token belongs to, on which node a pod runs, and to keep its certificate
// authority in one Secret and one ConfigMap; and, if that is wanted, to watch the
// policy objects and write their status.
//
// Nothing is polled, and every request but a watch has an end: an API server
// that is silent costs its caller RequestTimeout and no more. The objects must
// be there; the collector may change them and make none.
package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"time"

	authv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/procession-dev/procession/internal/ingest/token"
	"github.com/procession-dev/procession/internal/kubeapi"
	"github.com/procession-dev/procession/internal/pki"
)

// RequestTimeout bounds each request.
const RequestTimeout = 10 * time.Second

// A Client is safe for many goroutines.
type Client struct {
	rest rest.Interface
	cfg  *rest.Config
}

// New makes a client by the service account of the pod this runs in, or says
// kubeapi.ErrNotInCluster. agent names the program to the API server. It
// connects to nothing.
func New(agent string) (*Client, error) {
	cfg, err := kubeapi.InCluster(agent)
	if err != nil {
		return nil, err
	}
	return newClient(cfg)
}

func newClient(cfg *rest.Config) (*Client, error) {
	cfg.Timeout = RequestTimeout
	cfg.QPS = -1 // whoever asks often has a limit of his own
	c, err := kubeapi.Plain(cfg)
	if err != nil {
		return nil, err
	}
	return &Client{rest: c, cfg: cfg}, nil
}

// ReviewToken implements token.API.
func (c *Client) ReviewToken(ctx context.Context, shown, audience string) (token.Review, error) {
	body, err := json.Marshal(&authv1.TokenReview{
		TypeMeta: metav1.TypeMeta{APIVersion: "authentication.k8s.io/v1", Kind: "TokenReview"},
		Spec:     authv1.TokenReviewSpec{Token: shown, Audiences: []string{audience}},
	})
	if err != nil {
		return token.Review{}, fmt.Errorf("review a token: %w", err)
	}
	var r authv1.TokenReview
	req := c.rest.Post().AbsPath("/apis/authentication.k8s.io/v1/tokenreviews").SetHeader("Content-Type", "application/json").Body(body)
	if err := kubeapi.Read(ctx, req, &r); err != nil {
		return token.Review{}, fmt.Errorf("review a token: %w", err)
	}
	s := r.Status
	out := token.Review{Authenticated: s.Authenticated, Error: s.Error, Username: s.User.Username, Audiences: s.Audiences,
		Extra: make(map[string][]string, len(s.User.Extra))}
	for k, v := range s.User.Extra {
		out.Extra[k] = v
	}
	return out, nil
}

// PodNode implements token.API.
func (c *Client) PodNode(ctx context.Context, namespace, name string) (uid, node string, ok bool, err error) {
	var pod struct {
		Metadata metav1.ObjectMeta `json:"metadata"`
		Spec     struct {
			NodeName string `json:"nodeName"`
		} `json:"spec"`
	}
	err = kubeapi.Read(ctx, c.rest.Get().AbsPath(kubeapi.Path(namespace, "pods", name)), &pod)
	switch {
	case apierrors.IsNotFound(err):
		return "", "", false, nil
	case err != nil:
		return "", "", false, fmt.Errorf("look up pod %s/%s: %w", namespace, name, err)
	}
	return string(pod.Metadata.UID), pod.Spec.NodeName, true, nil
}

// A Ref names an object: NAMESPACE/NAME.
type Ref struct{ Namespace, Name string }

func (r Ref) String() string { return r.Namespace + "/" + r.Name }

// data is what is wanted of a Secret or a ConfigMap.
type data[T any] struct {
	Metadata struct {
		ResourceVersion string `json:"resourceVersion"`
	} `json:"metadata"`
	Data map[string]T `json:"data"`
}

// patch writes keys of a Secret or a ConfigMap, unless it was changed since
// version was read. A nil value removes a key.
func (c *Client) patch(ctx context.Context, resource string, ref Ref, version string, keys map[string]any) error {
	body, err := json.Marshal(map[string]any{"metadata": map[string]string{"resourceVersion": version}, "data": keys})
	if err != nil {
		return err
	}
	err = c.rest.Patch(types.MergePatchType).AbsPath(kubeapi.Path(ref.Namespace, resource, ref.Name)).Body(body).Do(ctx).Error()
	if apierrors.IsConflict(err) {
		return pki.ErrConflict
	}
	return err
}

// ApplyCRD makes the cluster's custom resource definition what manifest (JSON)
// says; it must be there already, or the account must be allowed to make it.
func (c *Client) ApplyCRD(ctx context.Context, name string, manifest []byte) error {
	err := c.rest.Patch(types.ApplyPatchType).AbsPath("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/"+url.PathEscape(name)).
		Param("fieldManager", "procession").Param("force", "true").Body(manifest).Do(ctx).Error()
	if err != nil {
		return fmt.Errorf("apply the definition of %s: %w", name, err)
	}
	return nil
}
