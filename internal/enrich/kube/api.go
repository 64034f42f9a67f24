package kube

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"
)

// An apiWatch lists and watches the pods of one node at the API server. It
// costs the API server a stream per node, and the agent the right to read all
// pods of the cluster: the choice where the kubelet cannot be asked.
type apiWatch struct {
	client *client
	node   string
}

func (*apiWatch) name() string { return "api-watch" }

// watchTime is how long a watch is asked to last; the next goes on where it ended.
const watchTime = 5 * time.Minute

func (a *apiWatch) follow(ctx context.Context, p *Pods, synced func()) error {
	query := url.Values{"fieldSelector": {"spec.nodeName=" + a.node}}
	version, err := a.list(ctx, p, query)
	if err != nil {
		return fmt.Errorf("api server: %w", err)
	}
	synced()
	for {
		version, err = a.watch(ctx, p, query, version)
		var gone *StatusError
		if errors.As(err, &gone) && gone.Code == http.StatusGone {
			// Too old to go on from: begin again with a list.
			version, err = a.list(ctx, p, query)
		}
		if err != nil {
			return fmt.Errorf("api server: %w", err)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

func (a *apiWatch) list(ctx context.Context, p *Pods, query url.Values) (version string, err error) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	body, err := a.client.get(ctx, "/api/v1/pods?"+query.Encode())
	if err != nil {
		return "", err
	}
	defer body.Close()
	pods, rejected, version, err := p.read(newDecoder(body))
	if err != nil {
		return "", err
	}
	p.replace(pods, rejected)
	return version, nil
}

// A watchEvent is one line of a watch. Object is a pod or, for ERROR, a status.
type watchEvent struct {
	Type   string `json:"type"`
	Object struct {
		wirePod
		Code    int    `json:"code"`
		Message string `json:"message"`
	} `json:"object"`
}

// watch applies events until the stream ends, and returns the version to go on from.
func (a *apiWatch) watch(ctx context.Context, p *Pods, query url.Values, version string) (string, error) {
	q := url.Values{
		"watch": {"true"}, "allowWatchBookmarks": {"true"}, "resourceVersion": {version},
		"timeoutSeconds": {fmt.Sprint(int(watchTime.Seconds()))},
	}
	for k, v := range query {
		q[k] = v
	}
	// A connection that died without a word is noticed by its overtime.
	ctx, cancel := context.WithTimeout(ctx, watchTime+listTimeout)
	defer cancel()
	body, err := a.client.get(ctx, "/api/v1/pods?"+q.Encode())
	if err != nil {
		return version, err
	}
	defer body.Close()
	d := newDecoder(body)
	for {
		var ev watchEvent
		if err := d.dec.Decode(&ev); err != nil {
			err = d.fault(err)
			if breaksOff(err) {
				return version, nil
			}
			return version, err
		}
		d.in = meter{r: d.in.r}
		switch ev.Type {
		case "ERROR":
			return version, &StatusError{ev.Object.Code, ev.Object.Message}
		case "BOOKMARK":
		default:
			if pod, ok := ev.Object.keep(p.cfg.Annotations); ok {
				p.update(pod, ev.Type == "DELETED")
			} else {
				p.reject()
			}
		}
		if v := ev.Object.Metadata.ResourceVersion; v != "" {
			version = v
		}
	}
}
