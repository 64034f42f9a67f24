package source

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"

	"github.com/procession-dev/procession/internal/policy"
)

// Bounds on objects. A tenant that makes more gets no more rules, and takes
// none from others.
const (
	maxClusterObjects   = 1000 // of a kind without namespaces
	maxNamespaceObjects = 100  // of a kind in one namespace

	// maxNamespaceRules is what is compiled of one namespace, to the next whole
	// policy: some kilobytes and half a millisecond for each rule. An engine's
	// budget is smaller, and what it leaves out should cost next to nothing.
	maxNamespaceRules = 512
)

// An Object is a policy as somebody who watches a cluster hands it over.
type Object struct {
	Namespace, Name string
	Text            []byte // as in a file; the caller does not change it
}

// Objects are the policies of a cluster. They are compiled as those of a Dir
// are, and each keeps its last good version in the same way. What is in force
// is kept on disk too, so that it is in force again after a restart without an
// API server. Its methods are called one at a time.
type Objects struct {
	d    *Dir // whose files are objects, by kind/name or kind/namespace/name
	good map[string][]byte
	text map[string][]byte
	disk keep
}

// NewObjects keeps the policies in force in the given file; "" keeps none.
func NewObjects(file string, log *slog.Logger) *Objects {
	d := NewDir("", log)
	return &Objects{d: d, good: map[string][]byte{}, text: map[string][]byte{}, disk: keep(file)}
}

// Load puts in force what was in force when it was last kept, and calls update
// before it returns. A file that is damaged is told and left out: nothing that
// failed its checksum gets into force.
func (o *Objects) Load(c *policy.Compiler, update func(Update)) error {
	o.d.compiler = c
	kept, err := o.disk.read()
	if err != nil {
		o.d.log.Error("the policies of the last run cannot be read; there is none in force until the API server answers", "err", err)
	}
	for _, k := range kept {
		if len(k.Good) > 0 {
			o.take(k.Key, k.Good)
		}
		if len(k.Text) > 0 {
			o.take(k.Key, k.Text)
		}
	}
	return o.d.publish(update)
}

// Set puts in force the objects of one kind, and calls update if that changes
// anything. Objects of the kind that are not among them are gone.
func (o *Objects) Set(kind string, objects []Object, update func(Update)) error {
	if o.d.compiler == nil {
		return errors.New("policies were set before a Load")
	}
	objects = slices.Clone(objects)
	slices.SortFunc(objects, func(a, b Object) int {
		return strings.Compare(a.Namespace+"/"+a.Name, b.Namespace+"/"+b.Name)
	})
	changed := false
	have := map[string]bool{}
	number, rules := map[string]int{}, map[string]int{} // by namespace
	for _, ob := range objects {
		key := kind + "/" + ob.Name
		if ob.Namespace != "" {
			key = kind + "/" + ob.Namespace + "/" + ob.Name
		}
		have[key] = true
		limit := maxNamespaceObjects
		if ob.Namespace == "" {
			limit = maxClusterObjects
		}
		if number[ob.Namespace]++; number[ob.Namespace] > limit {
			changed = o.refuse(key, ob.Text, fmt.Errorf("%s: at most %d policies of a kind are allowed here; this is one of those that come after by name", key, limit)) || changed
			continue
		}
		if ob.Namespace != "" && rules[ob.Namespace] >= maxNamespaceRules {
			changed = o.refuse(key, ob.Text, fmt.Errorf("%s: the policies before it by name have %d rules; of a namespace no more than %d are compiled", key, rules[ob.Namespace], maxNamespaceRules)) || changed
			continue
		}
		changed = o.take(key, ob.Text) || changed
		for _, p := range o.d.files[key].good {
			rules[ob.Namespace] += len(p.Rules)
		}
	}
	for key := range o.d.files {
		if strings.HasPrefix(key, kind+"/") && !have[key] {
			delete(o.d.files, key)
			delete(o.text, key)
			delete(o.good, key)
			changed = true
		}
	}
	if !changed {
		return nil
	}
	if err := o.d.publish(update); err != nil {
		return err
	}
	if err := o.disk.write(o.all()); err != nil {
		o.d.log.Warn("the policies in force cannot be kept on disk: after a restart there is none in force until the API server answers", "err", err)
	}
	return nil
}

// take compiles an object's text, if it is not what it was.
func (o *Objects) take(key string, text []byte) (changed bool) {
	sum := sha256.Sum256(text)
	old := o.d.files[key]
	if old != nil && old.sum == sum {
		return false
	}
	f := o.d.compile(key, text, old)
	f.sum, f.generation = sum, generationOf(text)
	o.d.files[key] = f
	o.text[key] = text
	if f.errs == nil {
		o.good[key] = text
	}
	return true
}

// refuse takes an object out of force, for a reason that is not in its text.
func (o *Objects) refuse(key string, text []byte, err error) (changed bool) {
	generation := generationOf(text)
	if old := o.d.files[key]; old != nil && old.errs != nil && old.errs.Error() == err.Error() && old.generation == generation {
		return false
	}
	o.d.files[key] = &file{kept: map[string]bool{}, errs: err, generation: generation}
	delete(o.text, key)
	delete(o.good, key)
	return true
}

// generationOf is the metadata.generation in an object's text, however broken
// its spec may be; 0 when it cannot be told.
func generationOf(text []byte) int64 {
	var o struct {
		Metadata struct {
			Generation int64 `json:"generation"`
		} `json:"metadata"`
	}
	if json.Unmarshal(text, &o) != nil {
		return 0
	}
	return o.Metadata.Generation
}

func (o *Objects) all() []kept {
	var all []kept
	for _, key := range slices.Sorted(maps.Keys(o.text)) {
		k := kept{Key: key, Text: o.text[key]}
		if good := o.good[key]; string(good) != string(k.Text) {
			k.Good = good
		}
		all = append(all, k)
	}
	return all
}

// States counts the policies of an update by state.
func (u Update) States() map[State]int {
	n := map[State]int{}
	for _, f := range u.Files {
		for _, p := range f.Policies {
			n[p.State]++
		}
		if len(f.Policies) == 0 && f.Err != nil { // too broken to have a name
			n[Refused]++
		}
	}
	return n
}
