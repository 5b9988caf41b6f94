package backends

import (
	"encoding"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// Option describes one key a user may set: where it is listed, what it defaults
// to and what it is for. Options makes them from a struct's fields; one written
// by hand takes any text.
type Option struct {
	// Name is the key. One that ends in ".KEY", such as label.KEY, stands for every
	// key that begins with what is before KEY.
	Name, Default, Help string
	// Secret values are never shown or logged.
	Secret bool
	// Values are the only texts allowed; empty means that the type decides.
	Values []string

	kind reflect.Type // nil is text
	min  string       // the least number allowed; empty is no bound
}

// Options returns the options that T, a struct, declares with its fields' tags,
// in the order of the fields; fields of embedded structs belong to it:
//
//	Size  Size              `option:"size" default:"10G" help:"size of the volume"`
//	FS    string            `option:"fs" default:"ext4" oneof:"ext4,xfs,btrfs" help:"…"`
//	UID   int               `option:"uid" min:"0" help:"…"`
//	Token string            `option:"token" secret:"true" help:"…"`
//	Label map[string]string `option:"label." help:"…"`
//
// A field is a string, bool, int, int64, Size, time.Duration, os.FileMode
// (octal), []string (separated by commas), map[string]string (its name ends in a
// dot and is a prefix), or an encoding.TextUnmarshaler. Fields without the tag
// are not options. A field of another type, or a default that is no valid value,
// is a mistake in the program and panics.
func Options[T any]() []Option {
	var options []Option
	for _, f := range fields(reflect.TypeFor[T]()) {
		options = append(options, f.option)
	}
	return options
}

// Decode returns a T with its defaults and, over them, values. Its error matches
// ErrInvalid, tells all that is wrong with values, and what is valid.
func Decode[T any](values map[string]string) (T, error) {
	return DecodeAs[T]("option", values)
}

// DecodeAs is Decode with another word than "option" in the error texts, such as
// "setting".
func DecodeAs[T any](noun string, values map[string]string) (T, error) {
	var result T
	fs := fields(reflect.TypeFor[T]())
	options := make([]Option, len(fs))
	for i, f := range fs {
		options[i] = f.option
	}
	if err := validate(noun, options, values); err != nil {
		return result, err
	}
	v := reflect.ValueOf(&result).Elem()
	for _, f := range fs {
		target := v.FieldByIndex(f.index)
		if f.option.isPrefix() {
			keys := map[string]string{}
			for key, text := range values {
				if f.option.matches(key) {
					keys[key[len(f.option.prefix()):]] = text
				}
			}
			target.Set(reflect.ValueOf(keys).Convert(target.Type()))
			continue
		}
		text, given := values[f.option.Name]
		if !given {
			if text = f.option.Default; text == "" {
				continue
			}
		}
		if err := set(target, text); err != nil {
			// validate has accepted this text.
			panic(fmt.Sprintf("backends: option %s: %v", f.option.Name, err))
		}
	}
	return result, nil
}

// Validate says whether values could be decoded by whoever declared options. Its
// error is Decode's.
func Validate(options []Option, values map[string]string) error {
	return validate("option", options, values)
}

// Pick returns those of values whose keys options declare.
func Pick(options []Option, values map[string]string) map[string]string {
	picked := map[string]string{}
	for key, text := range values {
		if _, ok := find(options, key); ok {
			picked[key] = text
		}
	}
	return picked
}

// Help returns options as a text table for people, a line for each.
func Help(options []Option) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "OPTION\tDEFAULT\tMEANING")
	for _, o := range options {
		def := o.Default
		switch {
		case def == "":
			def = "-"
		case o.Secret:
			def = "(secret)"
		}
		help := o.Help
		if len(o.Values) > 0 {
			help = strings.TrimPrefix(help+": "+alternatives(o.Values), ": ")
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", o.Name, def, help)
	}
	_ = w.Flush() // a strings.Builder takes everything
	return b.String()
}

const prefixMark = ".KEY"

func (o Option) isPrefix() bool { return strings.HasSuffix(o.Name, prefixMark) }

// prefix is "label." for "label.KEY".
func (o Option) prefix() string { return strings.TrimSuffix(o.Name, "KEY") }

func (o Option) matches(key string) bool {
	if o.isPrefix() {
		return strings.HasPrefix(key, o.prefix()) && len(key) > len(o.prefix())
	}
	return key == o.Name
}

// check returns what is wrong with text as a value, without the key.
func (o Option) check(text string) error {
	if len(o.Values) > 0 && !slices.Contains(o.Values, text) {
		return o.wrong(text, "is not valid", "use "+alternatives(o.Values))
	}
	if o.kind == nil || o.isPrefix() {
		return nil
	}
	v := reflect.New(o.kind).Elem()
	if err := set(v, text); err != nil {
		valid := validText(o.kind)
		if bad, ok := errors.AsType[*sizeError](err); ok {
			return o.wrong(text, bad.problem, bad.advice)
		}
		if valid == "" && !o.Secret {
			valid = err.Error()
		}
		return o.wrong(text, "is not valid", valid)
	}
	if o.min != "" {
		least := reflect.New(o.kind).Elem()
		if err := set(least, o.min); err != nil {
			panic(fmt.Sprintf("backends: option %s: min: %v", o.Name, err))
		}
		if v.Int() < least.Int() {
			return o.wrong(text, "is too small", "use "+o.min+" or more")
		}
	}
	return nil
}

func (o Option) wrong(text, problem, advice string) error {
	switch {
	case text == "":
		problem = "is empty"
	case o.Secret:
		problem = "its value is not valid"
	default:
		problem = strconv.Quote(text) + " " + problem
	}
	if advice == "" {
		return errors.New(problem)
	}
	return fmt.Errorf("%s; %s", problem, advice)
}

func validText(kind reflect.Type) string {
	switch kind {
	case reflect.TypeFor[Size]():
		return sizeAdvice
	case reflect.TypeFor[time.Duration]():
		return "use a time such as 500ms, 10s or 5m"
	case reflect.TypeFor[os.FileMode]():
		return "use permission bits in octal, such as 0755"
	}
	switch kind.Kind() {
	case reflect.Bool:
		return "use true or false"
	case reflect.Int, reflect.Int64:
		return "use a whole number"
	default:
		return ""
	}
}

func find(options []Option, key string) (Option, bool) {
	for _, o := range options {
		if o.matches(key) {
			return o, true
		}
	}
	return Option{}, false
}

func validate(noun string, options []Option, values map[string]string) error {
	keys := make([]string, 0, len(values))
	for key := range values {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	var problems []string
	unknown := false
	for _, key := range keys {
		o, ok := find(options, key)
		if !ok {
			problem := fmt.Sprintf("unknown %s %s", noun, quoteOdd(key))
			if near := Nearest(options, key); near != "" {
				problem += fmt.Sprintf("; did you mean %s?", near)
			}
			problems = append(problems, problem)
			unknown = true
			continue
		}
		if err := o.check(values[key]); err != nil {
			problems = append(problems, fmt.Sprintf("%s %s: %v", noun, quoteOdd(key), err))
		}
	}
	if len(problems) == 0 {
		return nil
	}
	if unknown {
		names := make([]string, len(options))
		for i, o := range options {
			names[i] = o.Name
		}
		slices.Sort(names)
		valid := fmt.Sprintf("valid %ss: %s", noun, strings.Join(names, ", "))
		if len(names) == 0 {
			valid = "there are no " + noun + "s here"
		}
		problems = append(problems, valid)
	}
	text := strings.ReplaceAll(strings.Join(problems, "; "), "?;", "?")
	return Classify(ErrInvalid, errors.New(text))
}

// quoteOdd keeps a plain word plain, and quotes what would make a message hard
// to read.
func quoteOdd(key string) string {
	plain := func(r rune) bool {
		return r > ' ' && r < 0x7f && r != '"' && r != ';' && r != ','
	}
	if key != "" && len(key) <= 64 && strings.IndexFunc(key, func(r rune) bool { return !plain(r) }) < 0 {
		return key
	}
	if len(key) > 64 {
		key = strings.ToValidUTF8(key[:64], "") + "…"
	}
	return strconv.Quote(key)
}

// Nearest returns the name of the option a user most likely meant by key, or "".
func Nearest(options []Option, key string) string {
	if len(key) > 64 {
		return ""
	}
	best, bestDistance := "", 0
	for _, o := range options {
		name := o.Name
		if o.isPrefix() {
			// label=x and labels.x=y are meant to be label.x.
			if strings.EqualFold(strings.TrimSuffix(o.prefix(), "."), key) {
				return o.Name
			}
			name = o.prefix()
			if before, _, ok := strings.Cut(key, "."); ok {
				if distance(name, strings.ToLower(before)+".") <= 2 {
					return o.Name
				}
			}
			continue
		}
		d := distance(strings.ToLower(name), strings.ToLower(key))
		if d <= max(1, min(len(name), len(key))/3) && (best == "" || d < bestDistance) {
			best, bestDistance = o.Name, d
		}
	}
	return best
}

// distance is the number of letters to insert, remove, replace or swap with their
// neighbour to make a from b.
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}

func alternatives(words []string) string {
	if len(words) == 1 {
		return words[0]
	}
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " or " + words[last]
}

type field struct {
	option Option
	index  []int
}

// fields reads the declarations of t, and panics if they are wrong.
func fields(t reflect.Type) []field {
	var found []field
	for _, f := range reflect.VisibleFields(t) {
		name, ok := f.Tag.Lookup("option")
		if !ok || !f.IsExported() {
			continue
		}
		o := Option{
			Name:    name,
			Default: f.Tag.Get("default"),
			Help:    f.Tag.Get("help"),
			Secret:  f.Tag.Get("secret") == "true",
			kind:    f.Type,
			min:     f.Tag.Get("min"),
		}
		if values := f.Tag.Get("oneof"); values != "" {
			o.Values = strings.Split(values, ",")
		}
		if f.Type.Kind() == reflect.Map {
			o.Name += "KEY"
			if !o.isPrefix() || !f.Type.ConvertibleTo(reflect.TypeFor[map[string]string]()) {
				panic(fmt.Sprintf("backends: option %s: a prefix ends in a dot and is a map[string]string", name))
			}
		}
		if o.Default != "" {
			if err := o.check(o.Default); err != nil {
				panic(fmt.Sprintf("backends: option %s: default: %v", name, err))
			}
		} else if !o.isPrefix() {
			// Panics for a type that cannot be an option.
			_ = set(reflect.New(f.Type).Elem(), "")
		}
		found = append(found, field{option: o, index: f.Index})
	}
	return found
}

// set parses text into v.
func set(v reflect.Value, text string) error {
	if u, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		return u.UnmarshalText([]byte(text))
	}
	switch v.Interface().(type) {
	case time.Duration:
		d, err := time.ParseDuration(text)
		if err == nil && d < 0 {
			err = errors.New("negative")
		}
		v.SetInt(int64(d))
		return err
	case os.FileMode:
		n, err := strconv.ParseUint(strings.TrimPrefix(text, "0o"), 8, 32)
		if err == nil && n > 0o777 {
			err = errors.New("more than permission bits")
		}
		v.SetUint(n)
		return err
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(text)
		return nil
	case reflect.Bool:
		b, err := strconv.ParseBool(text)
		v.SetBool(b)
		return err
	case reflect.Int, reflect.Int64:
		n, err := strconv.ParseInt(text, 10, v.Type().Bits())
		v.SetInt(n)
		return err
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.String {
			var list []string
			for word := range strings.SplitSeq(text, ",") {
				if word = strings.TrimSpace(word); word != "" {
					list = append(list, word)
				}
			}
			v.Set(reflect.ValueOf(list).Convert(v.Type()))
			return nil
		}
	default:
	}
	panic(fmt.Sprintf("backends: no option can be a %s", v.Type()))
}
