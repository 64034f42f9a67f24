package author

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/policy/policytest"
)

const maxFiles = 10_000

// stdin is the name of standard input, as an argument and in messages.
const stdin = "-"

// A tree is what the PATHs of a command line hold.
type tree struct {
	policies []string // files of policies, in the order of the arguments, then by name
	tests    []string // files of test cases
	errs     []error  // what could not be looked into
	seen     map[string]bool
}

func isTest(name string) bool {
	return strings.HasSuffix(strings.TrimSuffix(name, filepath.Ext(name)), ".test") && isYAML(name)
}

func isYAML(name string) bool {
	return slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(name))
}

// look finds the files behind paths. A file that is named is taken whatever
// its name; in folders only .yaml, .yml and .json are, and nothing hidden.
// Links to files are followed, links to folders are only where they are named:
// so a walk ends.
func look(paths []string) *tree {
	t := &tree{seen: map[string]bool{}}
	for _, p := range paths {
		if p == stdin {
			t.add(p)
			continue
		}
		st, err := os.Stat(p)
		switch {
		case err != nil:
			t.errs = append(t.errs, err)
		case st.IsDir():
			t.walk(p)
		default:
			t.add(filepath.Clean(p))
		}
	}
	return t
}

func (t *tree) walk(root string) {
	// With the separator a link to a folder is entered, and only this one.
	err := filepath.WalkDir(filepath.Clean(root)+string(filepath.Separator), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			t.errs = append(t.errs, err)
			return nil // the rest is still worth a look
		}
		hidden := strings.HasPrefix(d.Name(), ".") && filepath.Clean(path) != filepath.Clean(root)
		switch {
		case d.IsDir() && hidden:
			return fs.SkipDir
		case d.IsDir() || hidden || !isYAML(d.Name()):
			return nil
		case len(t.seen) == maxFiles:
			t.errs = append(t.errs, fmt.Errorf("%s: there are more than %d files", root, maxFiles))
			return fs.SkipAll
		}
		if d.Type()&fs.ModeSymlink != 0 {
			if st, err := os.Stat(path); err == nil && st.IsDir() {
				return nil
			}
		}
		t.add(filepath.Clean(path))
		return nil
	})
	if err != nil {
		t.errs = append(t.errs, err)
	}
}

func (t *tree) add(path string) {
	switch {
	case t.seen[path]:
		return
	case isTest(path):
		t.tests = append(t.tests, path)
	default:
		t.policies = append(t.policies, path)
	}
	t.seen[path] = true
}

// testsOf finds the test cases of a policy file: a.test.yaml beside a.yaml,
// or in a folder named tests.
func testsOf(path string) (found []string) {
	base := strings.TrimSuffix(filepath.Base(path), filepath.Ext(path))
	for _, dir := range []string{"", "tests"} {
		for _, ext := range []string{".yaml", ".yml", ".json"} {
			p := filepath.Join(filepath.Dir(path), dir, base+".test"+ext)
			if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() {
				found = append(found, p)
			}
		}
	}
	return found
}

// beside adds the test cases of the policies to those that were named.
func (t *tree) beside() {
	for _, p := range t.policies {
		for _, test := range testsOf(p) {
			t.add(test)
		}
	}
}

// unreadable is the error of everything that could not be looked into.
func (t *tree) unreadable() error {
	if len(t.errs) == 0 {
		return nil
	}
	return unreadableError{errors.Join(t.errs...)}
}

// read reads a file of at most limit bytes. A pipe or a device must neither
// block it nor feed it without end.
func (c *command) read(path string, limit int) ([]byte, error) {
	var in io.Reader = c.io.In
	if path != stdin {
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		st, err := f.Stat()
		switch {
		case err != nil:
			return nil, err
		case st.IsDir():
			return nil, fmt.Errorf("%s: is a folder", path)
		case !st.Mode().IsRegular():
			return nil, fmt.Errorf("%s: is not a file", path)
		}
		in = f
	}
	if in == nil {
		return nil, fmt.Errorf("%s: there is no standard input", path)
	}
	data, err := io.ReadAll(io.LimitReader(in, int64(limit)+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: %w", path, err)
	case len(data) > limit:
		return nil, fmt.Errorf("%s: has more than %d bytes, the most that is allowed", path, limit)
	}
	return data, nil
}

// An osFS opens files by the names that stand in messages: relative to where
// the command runs, and also above it.
type osFS struct{ c *command }

// Open implements fs.FS.
func (o osFS) Open(name string) (fs.File, error) { return os.Open(name) }

// ReadFile implements fs.ReadFileFS, within bounds.
func (o osFS) ReadFile(name string) ([]byte, error) { return o.c.read(name, policytest.MaxFileBytes) }

// ours says whether a file has anything to do with policies: folders hold
// other YAML, too.
func ours(text []byte) bool {
	return bytes.Contains(text, []byte("procession.dev")) || bytes.Contains(text, []byte("DetectionPolicy"))
}

// A policyFile is a file and the policies in it.
type policyFile struct {
	path     string
	policies []*policy.Policy
	objects  []*policy.Object
	errs     policy.Errors // what is wrong with it
}

// load reads and compiles the policy files of a tree. Files in folders that
// are not about policies are left out; skipped counts them.
func (c *command) load(compiler *policy.Compiler, t *tree, named []string) (files []*policyFile, skipped int) {
	for _, path := range t.policies {
		data, err := c.read(path, policy.MaxFileBytes)
		if err != nil {
			t.errs = append(t.errs, err)
			continue
		}
		if !slices.ContainsFunc(named, func(n string) bool { return n == path || filepath.Clean(n) == path }) && !ours(data) {
			skipped++
			continue
		}
		files = append(files, compileFile(compiler, path, data))
	}
	return files, skipped
}

func compileFile(compiler *policy.Compiler, path string, data []byte) *policyFile {
	f := &policyFile{path: path}
	fail := func(err error) {
		var errs policy.Errors
		if !errors.As(err, &errs) {
			errs = policy.Errors{{File: path, Msg: err.Error()}}
		}
		f.errs = append(f.errs, errs...)
	}
	objects, err := policy.Parse(path, data)
	if err != nil {
		fail(err)
	}
	for _, o := range objects {
		p, err := compiler.Compile(o)
		if err != nil {
			fail(err)
			continue
		}
		f.policies, f.objects = append(f.policies, p), append(f.objects, o)
	}
	return f
}

// set compiles everything behind paths, all of which must compile.
func (c *command) set(compiler *policy.Compiler, paths []string) (*policy.Set, error) {
	t := look(paths)
	files, _ := c.load(compiler, t, paths)
	if err := t.unreadable(); err != nil {
		return nil, err
	}
	var policies []*policy.Policy
	var errs policy.Errors
	for _, f := range files {
		errs = append(errs, f.errs...)
		policies = append(policies, f.policies...)
	}
	if len(errs) > 0 {
		return nil, unreadableError{fmt.Errorf("policies that do not compile:\n%w", errs)}
	}
	if len(policies) == 0 {
		return nil, usagef("there is no policy in %s", strings.Join(paths, ", "))
	}
	set, err := policy.NewSet(policies...)
	if err != nil {
		return nil, unreadableError{err}
	}
	return set, nil
}
