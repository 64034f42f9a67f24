package cluster

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
)

// A Request is one that the API server answered. A watch counts once, when it
// begins.
type Request struct {
	At       time.Time
	User     string // for example system:serviceaccount:NAMESPACE:NAME
	Verb     string
	Resource string // resource.group, with its subresource
	URI      string
	Code     int
}

// Requests are what the API server answered since a time, from its audit log.
func (c *Cluster) Requests(since time.Time) ([]Request, error) {
	f, err := os.Open(c.LogFile("audit"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var found []Request
	r := bufio.NewReader(f)
	for {
		line, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return found, nil // what has no end yet is being written
		}
		if err != nil {
			return nil, err
		}
		var e struct {
			Stage, Verb, RequestURI  string
			RequestReceivedTimestamp time.Time
			User                     struct{ Username string }
			ObjectRef                struct{ Resource, APIGroup, Subresource string }
			ResponseStatus           struct{ Code int }
		}
		if err := json.Unmarshal(line, &e); err != nil {
			return nil, fmt.Errorf("audit log: %w in %.200s", err, line)
		}
		final := "ResponseComplete"
		if e.Verb == "watch" {
			final = "ResponseStarted"
		}
		if e.Stage != final || e.RequestReceivedTimestamp.Before(since) {
			continue
		}
		q := Request{At: e.RequestReceivedTimestamp, User: e.User.Username, Verb: e.Verb, URI: e.RequestURI, Code: e.ResponseStatus.Code, Resource: e.ObjectRef.Resource}
		if e.ObjectRef.APIGroup != "" {
			q.Resource += "." + e.ObjectRef.APIGroup
		}
		if e.ObjectRef.Subresource != "" {
			q.Resource += "/" + e.ObjectRef.Subresource
		}
		found = append(found, q)
	}
}

// ContainerPID is the first process of a container, as the node numbers it.
func (c *Cluster) ContainerPID(ctx context.Context, pod Pod, container string) (int, error) {
	id := pod.ContainerIDs[container]
	out, err := c.ctr(ctx, "tasks", "ls")
	if err != nil {
		return 0, fmt.Errorf("list tasks: %w: %s", err, out)
	}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == id && id != "" {
			return strconv.Atoi(f[1])
		}
	}
	return 0, fmt.Errorf("container %s of %s/%s does not run", container, pod.Namespace, pod.Name)
}

// SigningKeyFile is the key that signs service-account tokens: who has it can
// make any token, also one whose time is over.
func (c *Cluster) SigningKeyFile() string { return c.Dir + "/pki/sa.key" }
