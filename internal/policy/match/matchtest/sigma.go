package matchtest

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// Sigma turns the process_creation rules for Linux below a folder into
// conditions. It knows what those use and refuses the rest.
func Sigma(dir string) ([]string, error) {
	var out []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".yml" {
			return err
		}
		c, err := sigmaFile(path)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		out = append(out, c)
		return nil
	})
	return out, err
}

func sigmaFile(path string) (string, error) {
	data, err := readFile(path)
	if err != nil {
		return "", err
	}
	var rule struct {
		Detection map[string]any `json:"detection"`
	}
	if err := yaml.Unmarshal(data, &rule); err != nil {
		return "", err
	}
	condition, ok := rule.Detection["condition"].(string)
	if !ok {
		return "", errors.New("detection.condition is no text")
	}
	s := &sigma{words: strings.Fields(strings.NewReplacer("(", " ( ", ")", " ) ").Replace(condition)), parts: map[string]string{}}
	for name, v := range rule.Detection {
		if name == "condition" {
			continue
		}
		if s.parts[name], err = selection(v); err != nil {
			return "", fmt.Errorf("detection.%s: %w", name, err)
		}
	}
	c, err := s.or()
	if err == nil && len(s.words) > 0 {
		err = fmt.Errorf("condition goes on with %q", s.words[0])
	}
	return c, err
}

// sigma reads a condition.
type sigma struct {
	words []string
	parts map[string]string
}

func (s *sigma) next() string {
	if len(s.words) == 0 {
		return ""
	}
	w := s.words[0]
	s.words = s.words[1:]
	return w
}

func (s *sigma) accept(w string) bool {
	if len(s.words) > 0 && s.words[0] == w {
		s.words = s.words[1:]
		return true
	}
	return false
}

func (s *sigma) or() (string, error)  { return s.chain("or", "||", s.and) }
func (s *sigma) and() (string, error) { return s.chain("and", "&&", s.not) }

func (s *sigma) chain(word, op string, next func() (string, error)) (string, error) {
	var list []string
	for {
		x, err := next()
		if err != nil {
			return "", err
		}
		if list = append(list, x); !s.accept(word) {
			return join(list, op), nil
		}
	}
}

func (s *sigma) not() (string, error) {
	if s.accept("not") {
		x, err := s.not()
		return "!" + x, err
	}
	if s.accept("(") {
		x, err := s.or()
		if err == nil && !s.accept(")") {
			err = errors.New("condition lacks a parenthesis")
		}
		return x, err
	}
	w := s.next()
	if (w == "1" || w == "all") && s.accept("of") {
		pattern := s.next()
		if pattern == "them" {
			pattern = "*"
		}
		var list []string
		for name, part := range s.parts {
			if ok, err := filepath.Match(pattern, name); err != nil {
				return "", err
			} else if ok {
				list = append(list, part)
			}
		}
		slices.Sort(list) // not in the order of the map
		if len(list) == 0 {
			return "", fmt.Errorf("condition: nothing is called %q", pattern)
		}
		return join(list, map[string]string{"1": "||", "all": "&&"}[w]), nil
	}
	part, ok := s.parts[w]
	if !ok {
		return "", fmt.Errorf("condition: nothing is called %q", w)
	}
	return part, nil
}

func join(list []string, op string) string {
	if len(list) == 1 {
		return list[0]
	}
	return "(" + strings.Join(list, " "+op+" ") + ")"
}

// selection is a map of fields, or a list of such of which one is enough.
func selection(v any) (string, error) {
	switch v := v.(type) {
	case []any:
		var list []string
		for _, x := range v {
			s, err := selection(x)
			if err != nil {
				return "", err
			}
			list = append(list, s)
		}
		return join(list, "||"), nil
	case map[string]any:
		var list []string
		for key, values := range v {
			s, err := comparison(key, values)
			if err != nil {
				return "", fmt.Errorf("%s: %w", key, err)
			}
			list = append(list, s)
		}
		slices.Sort(list)
		return join(list, "&&"), nil
	}
	return "", fmt.Errorf("%T is no selection", v)
}

var sigmaFields = map[string]string{"Image": "process.exe", "CommandLine": "process.cmdline", "ParentImage": "parent.exe",
	"ParentCommandLine": "parent.cmdline", "CurrentDirectory": "process.cwd", "User": "process.name", "LogonId": "process.loginuid"}

func comparison(key string, v any) (string, error) {
	words := strings.Split(key, "|")
	field, ok := sigmaFields[words[0]]
	if !ok {
		return "", errors.New("is not a field of process_creation")
	}
	test, op := "", "||"
	for _, w := range words[1:] {
		switch w {
		case "endswith", "contains", "startswith", "re":
			test = w
		case "all":
			op = "&&"
		default:
			return "", fmt.Errorf("modifier %q is not known", w)
		}
	}
	values, ok := v.([]any)
	if !ok {
		values = []any{v}
	}
	var list []string
	for _, x := range values {
		list = append(list, term(field, test, fmt.Sprint(x)))
	}
	return join(list, op), nil
}

func term(field, test, value string) string {
	if field == "process.loginuid" {
		return field + " == " + value
	}
	if test == "re" {
		return field + ".matches(" + Quote(value) + ")"
	}
	low := field + ".lowerAscii()"
	value = strings.ToLower(value)
	name := field[:strings.IndexByte(field, '.')] + ".name"
	switch test {
	case "contains":
		return low + ".contains(" + Quote(value) + ")"
	case "startswith":
		return low + ".startsWith(" + Quote(value) + ")"
	case "endswith":
		if tool, ok := strings.CutPrefix(value, "/"); ok && strings.HasSuffix(field, ".exe") && !strings.Contains(tool, "/") {
			return "(" + low + ".endsWith(" + Quote(value) + ") || " + name + " == " + Quote(tool) + ")"
		}
		return low + ".endsWith(" + Quote(value) + ")"
	}
	return low + " == " + Quote(value)
}

// Quote writes a text as CEL does.
func Quote(s string) string {
	var b strings.Builder
	b.WriteByte('\'')
	for _, r := range s {
		switch {
		case r == '\'' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < ' ' || r == 0x7f:
			fmt.Fprintf(&b, `\x%02x`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('\'')
	return b.String()
}
