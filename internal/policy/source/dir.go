package source

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/policy"
)

const (
	// RescanEvery bounds how long a change may go unnoticed that the kernel
	// does not tell about.
	RescanEvery = 10 * time.Second

	// settle is how long a change may take: programs write a file in several
	// steps, and change several files one after another.
	settle = 100 * time.Millisecond

	// pollEvery replaces notifications where there are none to be had.
	pollEvery = 500 * time.Millisecond

	maxFiles = 1000
)

// An Update is the state of the directory after a change.
type Update struct {
	Set   *policy.Set  // the rules to put in force
	Files []FileReport // by name
}

// A FileReport says what became of a file.
type FileReport struct {
	File     string // path, as given to NewDir and with the name; of an object kind/name or kind/namespace/name
	Err      error  // nil: all of it is in force; else of type policy.Errors or from the file system
	Policies []PolicyReport

	// Generation is the metadata.generation of an object as it was seen last, in
	// force or not; 0 of a file.
	Generation int64
}

// A PolicyReport says what became of a policy.
type PolicyReport struct {
	Name       string // NAME, or NAMESPACE/NAME
	State      State
	Generation int64  // of the version in force
	Digest     string // of the version in force; empty when none is
	Rules      int    // in force
}

// A State is what became of a policy.
type State string

// States.
const (
	Loaded  State = "Loaded"  // in force as it stands in the file
	Kept    State = "Kept"    // the file's version is broken; the last good one is in force
	Refused State = "Refused" // broken, or the name is taken; none is in force
)

// A Dir is a directory of policies. Its methods are called one at a time.
type Dir struct {
	dir      string
	log      *slog.Logger
	compiler *policy.Compiler
	files    map[string]*file
	owner    map[string]string // file that holds the policy in force, by full name of the policy
	lost     bool              // the directory could not be read the last time

	unpublished bool // a scan that failed had found changes before
}

// A file is what was last seen of one.
type file struct {
	sum  [sha256.Size]byte // of its text; zero when it could not be read
	good []*policy.Policy  // the versions to have in force
	kept map[string]bool   // those of good that are not what the file says
	errs error             // what is wrong with it
	bad  []string          // policies named in errs

	generation int64 // of an object's text
}

// NewDir is the directory dir: its files that end in .yaml, .yml or .json,
// without those whose names begin with a dot, and without files of test cases
// (NAME.test.yaml). Folders in it are not entered.
func NewDir(dir string, log *slog.Logger) *Dir {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Dir{dir: dir, log: log, files: map[string]*file{}, owner: map[string]string{}}
}

// Load reads the directory once and calls update before it returns. It fails
// when the directory cannot be read; a file that is broken does not make it
// fail, the Update tells.
func (d *Dir) Load(c *policy.Compiler, update func(Update)) error {
	d.compiler = c
	if _, err := d.scan(); err != nil {
		return err
	}
	return d.publish(update)
}

// Run keeps watching, and calls update after every change, until ctx ends. It
// begins with what has changed since Load; without a Load before, it loads.
func (d *Dir) Run(ctx context.Context, update func(Update)) error {
	if d.compiler == nil {
		c, err := policy.NewCompiler()
		if err != nil {
			return err
		}
		if err := d.Load(c, update); err != nil {
			return err
		}
	}
	w, err := newWatcher(d.dir)
	every := RescanEvery
	if err != nil {
		d.log.Warn("policy files cannot be watched and are read again and again instead", "dir", d.dir, "every", pollEvery, "err", err)
		every = pollEvery
	} else {
		defer w.close()
	}
	rescan := time.NewTicker(every)
	defer rescan.Stop()
	soon := time.NewTimer(0) // now: what changed between Load and here
	defer soon.Stop()
	waiting := true
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.changes():
			if !waiting { // do not wait longer because more is going on
				waiting = true
				soon.Reset(settle)
			}
			continue
		case <-soon.C:
			waiting = false
		case <-rescan.C:
		}
		// Before the files are read: what happens from here on is told again.
		w.follow(d.dir)
		changed, err := d.scan()
		if err != nil {
			if !d.lost {
				d.log.Error("policy files cannot be read; the rules in force stay", "dir", d.dir, "err", err)
			}
			d.lost, waiting = true, true
			soon.Reset(pollEvery) // what replaces it is not watched yet
			continue
		}
		d.lost = false
		if changed || d.unpublished {
			d.unpublished = false
			if err := d.publish(update); err != nil {
				d.log.Error("policies cannot be put in force; the rules in force stay", "dir", d.dir, "err", err)
			}
		}
	}
}

// names lists the policy files.
func (d *Dir) names() ([]string, error) {
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		return nil, fmt.Errorf("policy directory: %w", err)
	}
	var names []string
	for _, e := range entries {
		name := e.Name()
		// Test cases may stand beside their policy.
		test := strings.HasSuffix(strings.TrimSuffix(name, filepath.Ext(name)), ".test")
		if strings.HasPrefix(name, ".") || e.IsDir() || test {
			continue
		}
		if slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(name)) {
			names = append(names, name)
		}
	}
	if len(names) > maxFiles {
		return nil, fmt.Errorf("policy directory: %s holds %d policy files; at most %d are allowed", d.dir, len(names), maxFiles)
	}
	return names, nil
}

// scan reads what has changed and says whether anything has.
func (d *Dir) scan() (changed bool, err error) {
	names, err := d.names()
	if err != nil {
		return false, err
	}
	var gone []string
	for name := range d.files {
		if !slices.Contains(names, name) {
			gone = append(gone, name)
		}
	}
	for _, name := range names {
		path := filepath.Join(d.dir, name)
		data, err := read(path)
		if errors.Is(err, fs.ErrNotExist) { // gone since the list was made, or a link to nowhere
			if d.files[name] != nil {
				gone = append(gone, name)
			}
			continue
		}
		old := d.files[name]
		if err != nil {
			changed = d.unreadable(name, old, err) || changed
			continue
		}
		sum := sha256.Sum256(data)
		if old != nil && old.sum == sum {
			continue
		}
		d.files[name] = d.compile(path, data, old)
		d.files[name].sum = sum
		changed = true
	}
	if len(gone) == 0 {
		return changed, nil
	}
	// The directory itself may have been moved away meanwhile, and its files
	// with it: that must not take the rules out of force.
	if _, err := d.names(); err != nil {
		d.unpublished = d.unpublished || changed
		return false, err
	}
	for _, name := range gone {
		delete(d.files, name)
	}
	return true, nil
}

// unreadable keeps what a file said when it could be read.
func (d *Dir) unreadable(name string, old *file, err error) (changed bool) {
	if old == nil {
		old = new(file)
	} else if old.errs != nil && old.errs.Error() == err.Error() {
		return false
	}
	next := &file{good: old.good, kept: map[string]bool{}, errs: err}
	for _, p := range next.good {
		next.kept[p.FullName()] = true
	}
	d.files[name] = next
	return true
}

// read reads a file, bounded. A pipe or a device of that name must not block
// the agent or feed it without end.
func read(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a file", path)
	}
	// One byte more than allowed: Parse then says that it is too long.
	return io.ReadAll(io.LimitReader(f, policy.MaxFileBytes+1))
}

// compile makes the next state of a file out of its text and the state before.
func (d *Dir) compile(path string, data []byte, old *file) *file {
	if old == nil {
		old = new(file)
	}
	next := &file{kept: map[string]bool{}}
	objects, err := policy.Parse(path, data)
	var errs policy.Errors
	errors.As(err, &errs) // it promises to be of this type
	have := map[string]bool{}
	for _, o := range objects {
		p, err := d.reuse(o, old)
		if err != nil {
			var more policy.Errors
			errors.As(err, &more)
			errs = append(errs, more...)
			continue
		}
		if have[p.FullName()] {
			errs = append(errs, &policy.Error{File: path, Line: o.Line, Policy: p.FullName(), Field: "metadata.name",
				Msg: "is the name of another policy in this file as well; names must be unique"})
			continue
		}
		have[p.FullName()] = true
		next.good = append(next.good, p)
	}
	if len(errs) == 0 {
		return next
	}
	next.errs = errs
	nameless := false // a part that is too broken to say which policy it is
	for _, e := range errs {
		nameless = nameless || e.Policy == ""
		if e.Policy != "" && !slices.Contains(next.bad, e.Policy) {
			next.bad = append(next.bad, e.Policy)
		}
	}
	for _, p := range old.good {
		if !have[p.FullName()] && (nameless || slices.Contains(next.bad, p.FullName())) {
			next.good = append(next.good, p)
			next.kept[p.FullName()] = true
		}
	}
	return next
}

// reuse compiles a policy, unless it is as it was.
func (d *Dir) reuse(o *policy.Object, old *file) (*policy.Policy, error) {
	for _, p := range old.good {
		if p.Digest == o.Digest && p.FullName() == o.FullName() && p.File == o.File {
			return p, nil
		}
	}
	return d.compiler.Compile(o)
}

// publish makes a set and a report out of the files' states.
func (d *Dir) publish(update func(Update)) error {
	names := make([]string, 0, len(d.files))
	for name := range d.files {
		names = append(names, name)
	}
	slices.Sort(names)
	owner := d.owners(names)
	var policies []*policy.Policy
	u := Update{}
	rules, broken := 0, 0
	for _, name := range names {
		f := d.files[name]
		r := FileReport{File: filepath.Join(d.dir, name), Err: f.errs, Generation: f.generation}
		var taken policy.Errors
		for _, p := range f.good {
			if first := owner[p.FullName()]; first != name {
				taken = append(taken, &policy.Error{File: r.File, Policy: p.FullName(), Field: "metadata.name",
					Msg: "is the name of a policy in " + filepath.Join(d.dir, first) + " as well; names must be unique"})
				r.Policies = append(r.Policies, PolicyReport{Name: p.FullName(), State: Refused})
				continue
			}
			state := Loaded
			if f.kept[p.FullName()] {
				state = Kept
			}
			policies = append(policies, p)
			rules += len(p.Rules)
			r.Policies = append(r.Policies, PolicyReport{Name: p.FullName(), State: state, Generation: p.Generation, Digest: p.Digest, Rules: len(p.Rules)})
		}
		for _, name := range f.bad {
			if !slices.ContainsFunc(r.Policies, func(p PolicyReport) bool { return p.Name == name }) {
				r.Policies = append(r.Policies, PolicyReport{Name: name, State: Refused})
			}
		}
		if len(taken) > 0 {
			r.Err = join(taken, f.errs)
		}
		if r.Err != nil {
			broken++
			d.log.Error("policy file is not in force as it stands", "file", r.File, "kept", len(f.kept), "err", r.Err)
		}
		u.Files = append(u.Files, r)
	}
	set, err := policy.NewSet(policies...)
	if err != nil {
		return err
	}
	d.owner = owner
	d.log.Info("policies are in force", "dir", d.dir, "files", len(names), "policies", len(policies), "rules", rules, "broken_files", broken)
	u.Set = set
	update(u)
	return nil
}

func join(taken policy.Errors, err error) error {
	var more policy.Errors
	if err == nil || errors.As(err, &more) {
		return append(taken, more...)
	}
	return errors.Join(taken, err)
}

// owners decides which file a policy is taken from: the one it is taken from
// already, or else the first one by name.
func (d *Dir) owners(names []string) map[string]string {
	owner := map[string]string{}
	for _, name := range names {
		for _, p := range d.files[name].good {
			if _, ok := owner[p.FullName()]; !ok || d.owner[p.FullName()] == name {
				owner[p.FullName()] = name
			}
		}
	}
	return owner
}
