package main

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/flocker-plugin/flocker/backends"
)

// backendName is what a backend in backends.yaml may be called: it is a part of keys in
// etcd, of paths and of options.
var backendName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,19}$`)

const maxBackendsFile = 1 << 20

// parseBackends reads backends.yaml, which maps names to what is behind them:
//
//	gold:
//	  type: ebs
//	  region: eu-central-1
//
// Whatever is not understood is an error, with its line: a key that is misspelt is not
// one that was left out. What type is has its Config, by the yaml tags of its fields.
func parseBackends(file string, text []byte) ([]configured, error) {
	wrong := func(line int, format string, args ...any) error {
		return fmt.Errorf("%s, line %d: %s", file, line, fmt.Sprintf(format, args...))
	}
	if len(text) > maxBackendsFile {
		return nil, fmt.Errorf("%s: it is larger than 1 MiB", file)
	}
	documents := yaml.NewDecoder(bytes.NewReader(text))
	var root yaml.Node
	switch err := documents.Decode(&root); {
	case errors.Is(err, io.EOF):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("%s: %s", file, strings.TrimPrefix(err.Error(), "yaml: "))
	}
	var second yaml.Node
	if err := documents.Decode(&second); !errors.Is(err, io.EOF) {
		return nil, wrong(max(second.Line, root.Line), "a second document begins (---): put all backends into one")
	}
	d := decoder{}
	var all []configured
	for key, value := range d.pairs(root.Content[0], "", "names of backends") {
		c := configured{name: key.Value, file: file, line: key.Line}
		if !backendName.MatchString(c.name) {
			d.wrong(key, "%q: a backend's name is 1 to 20 small letters, digits and dashes, and begins with a letter", c.name)
			continue
		}
		if c.kind = d.kindOf(value, c); c.kind == "" {
			continue
		}
		c.config = kinds[c.kind].config()
		d.within = "backend " + c.name
		d.fill(reflect.ValueOf(c.config).Elem(), value, "")
		d.within = ""
		all = append(all, c)
	}
	if len(d.problems) > 0 {
		slices.SortStableFunc(d.problems, func(a, b problem) int { return a.line - b.line })
		p := d.problems[0]
		err := wrong(p.line, "%s", p.text)
		if more := len(d.problems) - 1; more > 0 {
			err = fmt.Errorf("%w (and %d more)", err, more)
		}
		return nil, err
	}
	return all, nil
}

// A decoder makes Go values of what a YAML parser has read.
type decoder struct {
	within   string // what problems begin with
	problems []problem
}

type problem struct {
	line int
	text string
}

func (d *decoder) wrong(at *yaml.Node, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if d.within != "" {
		text = d.within + ": " + text
	}
	d.problems = append(d.problems, problem{at.Line, text})
}

// typeKey is the key of a backend's type; nameKey is none, for the name stands outside.
const (
	typeKey = "type"
	nameKey = "name"
)

// kindOf returns a backend's type, or "" if there is none.
func (d *decoder) kindOf(of *yaml.Node, c configured) string {
	valid := "use " + strings.Join(slices.Sorted(maps.Keys(kinds)), ", ")
	d.within = "backend " + c.name
	defer func() { d.within = "" }()
	before := len(d.problems)
	for key, value := range d.pairs(of, "", "settings, such as type: csi") {
		if key.Value != typeKey {
			continue
		}
		if _, ok := kinds[value.Value]; value.Kind != yaml.ScalarNode || !ok {
			d.wrong(value, "unknown type %q; %s", value.Value, valid)
			return ""
		}
		return value.Value
	}
	if len(d.problems) == before {
		d.wrong(of, "it has no type; %s", valid)
	}
	return ""
}

// pairs goes through a mapping, and notes what is none, or is there twice.
func (d *decoder) pairs(of *yaml.Node, path, what string) func(yield func(key, value *yaml.Node) bool) {
	return func(yield func(key, value *yaml.Node) bool) {
		where := ""
		if path != "" {
			where = path + ": "
		}
		if of.Kind != yaml.MappingNode {
			d.wrong(of, "%shere belong %s, each with a colon after it%s", where, what, ifAlias(of))
			return
		}
		lines := map[string]int{}
		for i := 0; i+1 < len(of.Content); i += 2 {
			key, value := of.Content[i], of.Content[i+1]
			switch first, twice := lines[key.Value]; {
			case key.Kind != yaml.ScalarNode || key.Tag == "!!merge":
				d.wrong(key, "%sa key is one word; write everything out, without & * and <<", where)
				continue
			case twice:
				d.wrong(key, "%s%s is there twice, first in line %d", where, key.Value, first)
				continue
			}
			lines[key.Value] = key.Line
			if !yield(key, value) {
				return
			}
		}
	}
}

func ifAlias(node *yaml.Node) string {
	if node.Kind == yaml.AliasNode {
		return "; write it out, without & and *"
	}
	return ""
}

// fill sets v to what node says. path is the keys that lead to it.
func (d *decoder) fill(v reflect.Value, node *yaml.Node, path string) {
	if _, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		d.scalar(v, node, path)
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		d.fill(v.Elem(), node, path)
	case reflect.Struct:
		d.structure(v, node, path)
	case reflect.Map:
		m := reflect.MakeMap(v.Type())
		for key, value := range d.pairs(node, path, "names") {
			element := reflect.New(v.Type().Elem()).Elem()
			d.fill(element, value, join(path, key.Value))
			m.SetMapIndex(reflect.ValueOf(key.Value).Convert(v.Type().Key()), element)
		}
		v.Set(m)
	case reflect.Slice:
		if node.Kind != yaml.SequenceNode {
			d.wrong(node, "%s: here belongs a list, such as [a, b]%s", path, ifAlias(node))
			return
		}
		list := reflect.MakeSlice(v.Type(), len(node.Content), len(node.Content))
		for i, element := range node.Content {
			d.fill(list.Index(i), element, fmt.Sprintf("%s[%d]", path, i))
		}
		v.Set(list)
	default:
		d.scalar(v, node, path)
	}
}

func join(path, key string) string { return strings.TrimPrefix(path+"."+key, ".") }

func (d *decoder) structure(v reflect.Value, node *yaml.Node, path string) {
	fields := map[string]int{}
	var known []backends.Option
	for i := range v.NumField() {
		name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("yaml"), ",")
		if name != "" && name != "-" && (path != "" || name != nameKey) {
			fields[name] = i
			known = append(known, backends.Option{Name: name})
		}
	}
	for key, value := range d.pairs(node, path, "settings") {
		i, ok := fields[key.Value]
		switch {
		case ok:
			d.fill(v.Field(i), value, join(path, key.Value))
		case path == "" && key.Value == typeKey:
		default:
			advice := "valid: " + strings.Join(slices.Sorted(maps.Keys(fields)), ", ")
			if near := backends.Nearest(known, key.Value); near != "" {
				advice = "did you mean " + near + "?"
			}
			if path == "" && key.Value == nameKey {
				advice = "the name is what stands before the colon, with the settings below it"
			}
			d.wrong(key, "unknown key %s; %s", join(path, key.Value), advice)
		}
	}
}

// scalar sets v to a single value.
func (d *decoder) scalar(v reflect.Value, node *yaml.Node, path string) {
	text := node.Value
	switch {
	case node.Kind != yaml.ScalarNode:
		d.wrong(node, "%s: here belongs a single value%s", path, ifAlias(node))
		return
	case node.Tag == "!!null":
		d.wrong(node, "%s has no value: give it one, or remove it", path)
		return
	}
	bad := func(advice string) { d.wrong(node, "%s: %q is not valid; %s", path, text, advice) }
	if u, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		if err := u.UnmarshalText([]byte(text)); err != nil {
			d.wrong(node, "%s: %v", path, err)
		}
		return
	}
	if v.Type() == reflect.TypeFor[time.Duration]() {
		t, err := time.ParseDuration(text)
		if err != nil || t < 0 || text == "0" {
			bad("use a time such as 500ms, 10s or 5m")
		}
		v.SetInt(int64(t))
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(text)
	case reflect.Bool:
		if text != "true" && text != "false" {
			bad("use true or false")
		}
		v.SetBool(text == "true")
	case reflect.Int, reflect.Int32, reflect.Int64:
		n, err := strconv.ParseInt(text, 10, v.Type().Bits())
		if err != nil {
			bad("use a whole number")
		}
		v.SetInt(n)
	case reflect.Float64:
		n, err := strconv.ParseFloat(text, 64)
		if err != nil || n != n || n-n != 0 {
			bad("use a number")
		}
		v.SetFloat(n)
	default:
		panic(fmt.Sprintf("backends.yaml: no setting can be a %s", v.Type()))
	}
}
