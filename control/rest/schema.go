package rest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/flocker-plugin/flocker/control"
)

// The bodies of v1 are checked as the original did, with a JSON schema; what is wrong is
// said in the words of the library it used, which clients show and tests compare.

const (
	undecodable = "The request body could not be decoded according to the value of the\nContent-Type header."
	mismatched  = "The provided JSON doesn't match the required schema."
)

// uuid4 is the only form of an id that v1 knows.
const uuid4 = `^[A-Fa-f0-9]{8}-[A-Fa-f0-9]{4}-4[A-Fa-f0-9]{3}-[89abAB][A-Fa-f0-9]{3}-[A-Fa-f0-9]{12}$`

var uuid4Form = regexp.MustCompile(uuid4)

const (
	minSize     = 64 << 20
	sizeUnit    = 1024
	maxMetadata = 16
	maxWord     = 256 // characters of a key or value of metadata
)

// A field checks one value and says what is wrong with it.
type field func(value any) []string

// An object is a schema: the fields there may be, and those there must be.
type object struct {
	fields   map[string]field
	required []string
}

var (
	createSchema = object{map[string]field{
		"primary": aUUID, "dataset_id": aUUID, "maximum_size": aSize, "metadata": someMetadata, "deleted": aBoolean,
	}, []string{"primary"}}
	updateSchema = object{map[string]field{"primary": aUUID}, nil}
	leaseSchema  = object{map[string]field{
		"dataset_id": aDatasetID, "node_uuid": aUUID, "expires": aDuration,
	}, []string{"dataset_id", "node_uuid", "expires"}}
)

// decode reads a body that has to match a schema.
func (o object) decode(r *http.Request, into any) error {
	data, err := read(r)
	if err != nil {
		return err
	}
	var value any
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	if err := dec.Decode(&value); err != nil {
		return badRequest(undecodable)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return badRequest(undecodable)
	}
	if wrong := o.check(value); len(wrong) > 0 {
		return &refusal{status: http.StatusBadRequest, text: mismatched, errors: wrong}
	}
	if err := json.Unmarshal(data, into); err != nil {
		return badRequest(undecodable)
	}
	return nil
}

func (o object) check(value any) (wrong []string) {
	fields, ok := value.(map[string]any)
	if !ok {
		return notOf(value, "'object'")
	}
	var unknown []string
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		if check := o.fields[name]; check != nil {
			wrong = append(wrong, check(fields[name])...)
		} else {
			unknown = append(unknown, name)
		}
	}
	wrong = append(wrong, unexpected(unknown)...)
	for _, name := range o.required {
		if _, ok := fields[name]; !ok {
			wrong = append(wrong, show(name)+" is a required property")
		}
	}
	return wrong
}

func unexpected(names []string) []string {
	switch len(names) {
	case 0:
		return nil
	case 1:
		return []string{fmt.Sprintf("Additional properties are not allowed (%s was unexpected)", show(names[0]))}
	}
	shown := make([]string, len(names))
	for i, name := range names {
		shown[i] = show(name)
	}
	return []string{fmt.Sprintf("Additional properties are not allowed (%s were unexpected)", strings.Join(shown, ", "))}
}

func notOf(value any, kinds string) []string {
	return []string{show(value) + " is not of type " + kinds}
}

func aUUID(value any) []string {
	s, ok := value.(string)
	switch {
	case !ok:
		return notOf(value, "'string'")
	case !uuid4Form.MatchString(s):
		return []string{fmt.Sprintf("%s does not match '%s'", show(s), uuid4)}
	}
	return nil
}

func aDatasetID(value any) []string {
	s, ok := value.(string)
	switch n := utf8.RuneCountInString(s); {
	case !ok:
		return notOf(value, "'string'")
	case n < 36:
		return []string{show(s) + " is too short"}
	case n > 36:
		return []string{show(s) + " is too long"}
	}
	return nil
}

func aSize(value any) []string {
	if value == nil {
		return nil
	}
	number, _ := value.(json.Number)
	n, err := strconv.ParseInt(number.String(), 10, 64)
	switch {
	case errors.Is(err, strconv.ErrRange) && number[0] != '-':
		return []string{show(value) + " is greater than the maximum of 9223372036854775807"}
	case errors.Is(err, strconv.ErrRange):
		n = -1
	case err != nil:
		return notOf(value, "'integer', 'null'")
	}
	var wrong []string
	if n < minSize {
		wrong = append(wrong, fmt.Sprintf("%s is less than the minimum of %d", show(value), minSize))
	}
	if n%sizeUnit != 0 {
		wrong = append(wrong, fmt.Sprintf("%s is not a multiple of %d", show(value), sizeUnit))
	}
	return wrong
}

func aBoolean(value any) []string {
	if _, ok := value.(bool); !ok {
		return notOf(value, "'boolean'")
	}
	return nil
}

func aDuration(value any) []string {
	if value == nil {
		return nil
	}
	number, ok := value.(json.Number)
	if !ok {
		return notOf(value, "'number', 'null'")
	}
	if seconds, err := number.Float64(); err != nil || seconds > maxLease.Seconds() {
		return []string{fmt.Sprintf("%s is greater than the maximum of %.0f", show(value), maxLease.Seconds())}
	} else if seconds <= 0 {
		return []string{show(value) + " is less than or equal to the minimum of 0"}
	}
	return nil
}

func someMetadata(value any) (wrong []string) {
	entries, ok := value.(map[string]any)
	if !ok {
		return notOf(value, "'object'")
	}
	if len(entries) > maxMetadata {
		wrong = append(wrong, show(value)+" has too many properties")
	}
	var unknown []string
	for _, key := range slices.Sorted(maps.Keys(entries)) {
		if n := utf8.RuneCountInString(key); n < 1 || n > maxWord {
			unknown = append(unknown, key)
			continue
		}
		switch s, ok := entries[key].(string); {
		case !ok:
			wrong = append(wrong, notOf(entries[key], "'string'")...)
		case utf8.RuneCountInString(s) > maxWord:
			wrong = append(wrong, show(s)+" is too long")
		}
	}
	return append(wrong, unexpected(unknown)...)
}

// show writes a value as the original's language did, cut short.
func show(value any) string {
	text := ""
	switch v := value.(type) {
	case nil:
		return "None"
	case bool:
		if v {
			return "True"
		}
		return "False"
	case json.Number:
		text = v.String()
	case string:
		text = "'" + strings.ReplaceAll(strings.Trim(string(control.Encode(v)), "\"\n"), `\"`, `"`) + "'"
	default:
		text = strings.TrimSuffix(string(control.Encode(v)), "\n")
	}
	if len(text) > 400 {
		text = strings.ToValidUTF8(text[:400], "") + "…"
	}
	return text
}
