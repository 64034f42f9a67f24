package kube

import (
	"errors"

	"google.golang.org/protobuf/encoding/protowire"
)

// Numbers of the fields that are read of v1.Pod and below it (generated.proto
// in k8s.io/api/core/v1 and k8s.io/apimachinery/pkg/apis/meta/v1). They are
// part of Kubernetes' stored format and do not change.

// decodeProto reads a v1.Pod as its Marshal method writes it.
func decodeProto(b []byte, p *wirePod) error {
	if len(b) > maxObject {
		return errTooLarge
	}
	if err := fields(b, p.field); err != nil {
		return &MalformedError{err}
	}
	return nil
}

// A value is one field's: of a length-delimited field its bytes, else a number.
type value struct {
	bytes  []byte
	number uint64
}

// fields calls each for each field of a message.
func fields(b []byte, each func(protowire.Number, value) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		var v value
		switch typ {
		case protowire.BytesType:
			v.bytes, n = protowire.ConsumeBytes(b)
		case protowire.VarintType:
			v.number, n = protowire.ConsumeVarint(b)
		default:
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if err := each(num, v); err != nil {
			return err
		}
	}
	return nil
}

func (p *wirePod) field(n protowire.Number, v value) error {
	switch n {
	case 1:
		return fields(v.bytes, p.Metadata.field)
	case 2:
		return fields(v.bytes, p.Spec.field)
	case 3:
		return fields(v.bytes, p.Status.field)
	}
	return nil
}

func (m *wireMeta) field(n protowire.Number, v value) error {
	switch n {
	case 1:
		m.Name = string(v.bytes)
	case 3:
		m.Namespace = string(v.bytes)
	case 5:
		m.UID = string(v.bytes)
	case 6:
		m.ResourceVersion = string(v.bytes)
	case 11:
		return pair(v.bytes, &m.Labels)
	case 12:
		return pair(v.bytes, &m.Annotations)
	case 13:
		m.Owners = append(m.Owners, wireOwner{})
		return fields(v.bytes, m.Owners[len(m.Owners)-1].field)
	}
	return nil
}

// pair adds one entry of a map.
func pair(b []byte, to *map[string]string) error {
	var key, val string
	err := fields(b, func(n protowire.Number, v value) error {
		switch n {
		case 1:
			key = string(v.bytes)
		case 2:
			val = string(v.bytes)
		}
		return nil
	})
	if *to == nil {
		*to = make(map[string]string)
	}
	(*to)[key] = val
	return err
}

func (o *wireOwner) field(n protowire.Number, v value) error {
	switch n {
	case 1:
		o.Kind = string(v.bytes)
	case 3:
		o.Name = string(v.bytes)
	case 6:
		o.Controller = v.number != 0
	}
	return nil
}

// errMany bounds the elements of a list: 100 bytes must not become 100 structs
// of 500.
var errMany = errors.New("too many containers")

func (s *wireSpec) field(n protowire.Number, v value) error {
	add := func(to *[]wireContainer, b []byte) error {
		if len(*to) == 8*maxContainers {
			return errMany
		}
		*to = append(*to, wireContainer{})
		return fields(b, (*to)[len(*to)-1].field)
	}
	switch n {
	case 2:
		return add(&s.Containers, v.bytes)
	case 20:
		return add(&s.Init, v.bytes)
	case 34: // EphemeralContainer: the same fields in a message of their own
		return fields(v.bytes, func(n protowire.Number, v value) error {
			if n == 1 {
				return add(&s.Ephemeral, v.bytes)
			}
			return nil
		})
	case 8:
		s.ServiceAccount = string(v.bytes)
	case 11:
		s.HostNetwork = v.number != 0
	case 12:
		s.HostPID = v.number != 0
	case 13:
		s.HostIPC = v.number != 0
	}
	return nil
}

func (c *wireContainer) field(n protowire.Number, v value) error {
	switch n {
	case 1:
		c.Name = string(v.bytes)
	case 2:
		c.Image = string(v.bytes)
	case 10:
		return c.Liveness.probe(v.bytes)
	case 11:
		return c.Readiness.probe(v.bytes)
	case 22:
		return c.Startup.probe(v.bytes)
	case 12:
		return fields(v.bytes, func(n protowire.Number, v value) error {
			switch n {
			case 1:
				return fields(v.bytes, c.Lifecycle.PostStart.field)
			case 2:
				return fields(v.bytes, c.Lifecycle.PreStop.field)
			}
			return nil
		})
	case 15:
		return fields(v.bytes, func(n protowire.Number, v value) error {
			if n == 2 {
				c.Security.Privileged = v.number != 0
			}
			return nil
		})
	case 24:
		c.RestartPolicy = string(v.bytes)
	}
	return nil
}

// probe reads a Probe, whose first field is the handler.
func (h *wireHandler) probe(b []byte) error {
	return fields(b, func(n protowire.Number, v value) error {
		if n == 1 {
			return fields(v.bytes, h.field)
		}
		return nil
	})
}

// field reads a ProbeHandler or a LifecycleHandler.
func (h *wireHandler) field(n protowire.Number, v value) error {
	if n != 1 {
		return nil
	}
	return fields(v.bytes, func(n protowire.Number, v value) error {
		if n == 1 {
			h.Exec.Command = append(h.Exec.Command, string(v.bytes))
		}
		return nil
	})
}

func (s *wireStatus) field(n protowire.Number, v value) error {
	var to *[]wireRun
	switch n {
	case 8:
		to = &s.Containers
	case 10:
		to = &s.Init
	case 13:
		to = &s.Ephemeral
	default:
		return nil
	}
	if len(*to) == 8*maxContainers {
		return errMany
	}
	*to = append(*to, wireRun{})
	return fields(v.bytes, (*to)[len(*to)-1].field)
}

func (r *wireRun) field(n protowire.Number, v value) error {
	switch n {
	case 1:
		r.Name = string(v.bytes)
	case 2:
		return r.State.read(v.bytes)
	case 3:
		return r.LastState.read(v.bytes)
	case 7:
		r.ImageID = string(v.bytes)
	case 8:
		r.ContainerID = string(v.bytes)
	}
	return nil
}

func (s *wireState) read(b []byte) error {
	return fields(b, func(n protowire.Number, v value) error {
		if n != 3 {
			return nil
		}
		return fields(v.bytes, func(n protowire.Number, v value) error {
			if n == 7 {
				s.Terminated.ContainerID = string(v.bytes)
			}
			return nil
		})
	})
}
