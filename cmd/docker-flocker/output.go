package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"reflect"
	"slices"
	"strings"
	"text/tabwriter"
	"text/template"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

// columns is how wide a table is at most: a terminal as it always was.
const columns = 80

// output is how a command that reads prints.
type output struct {
	format string
	quiet  bool
	whole  bool
}

// flags are those of a list.
func (o *output) flags(cmd *cobra.Command, what string) {
	o.formatFlag(cmd)
	cmd.Flags().BoolVarP(&o.quiet, "quiet", "q", false, "only the "+what+"s, one on a line")
	cmd.Flags().BoolVar(&o.whole, "no-trunc", false, "shorten nothing, however wide the table is")
}

func (o *output) formatFlag(cmd *cobra.Command) {
	cmd.Flags().StringVar(&o.format, "format", "", "json, table, or a Go `template` such as '{{.Name}}'; 'table TEMPLATE' has headings")
}

// template is what --format says, nil where it is left out or "table". It is read
// before anything is asked.
func (o *output) template() (*template.Template, error) {
	if o.quiet && o.format != "" {
		return nil, errors.New("--quiet and --format do not go together")
	}
	text := strings.TrimSpace(strings.TrimPrefix(o.format, "table"))
	switch text {
	case "":
		return nil, nil
	case "json":
		text = "{{json .}}"
	}
	text = strings.NewReplacer(`\t`, "\t", `\n`, "\n").Replace(text) // the shell has left them
	tmpl, err := template.New("format").Funcs(functions).Parse(text)
	if err != nil {
		return nil, fmt.Errorf("--format cannot be understood: %w", err)
	}
	return tmpl, nil
}

// functions are those of Docker's templates, and size.
var functions = template.FuncMap{
	"json":  compact,
	"join":  strings.Join,
	"split": strings.Split,
	"lower": strings.ToLower,
	"upper": strings.ToUpper,
	"title": func(s string) string {
		if s == "" {
			return s
		}
		return strings.ToUpper(s[:1]) + s[1:]
	},
	"pad": func(s string, before, after int) string {
		return strings.Repeat(" ", before) + s + strings.Repeat(" ", after)
	},
	"truncate": func(s string, length int) string { return string([]rune(s)[:min(length, utf8.RuneCountInString(s))]) },
	"size": func(v any) string {
		if bytes, ok := v.(int64); ok {
			return size(bytes)
		}
		return fmt.Sprint(v) // a heading
	},
}

func compact(v any) (string, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	err := enc.Encode(v)
	return strings.TrimSuffix(b.String(), "\n"), err
}

// A listing is what a command that lists shows: a table, if nothing else is wished.
type listing[T any] struct {
	header string // words between tabs
	row    func(T) string
	name   func(T) string
}

// print prints rows as o says. An error that is no failure is in what was typed.
func (l listing[T]) print(w io.Writer, o output, tmpl *template.Template, rows []T) error {
	switch {
	case o.quiet:
		for _, row := range rows {
			fmt.Fprintln(w, l.name(row))
		}
	case tmpl != nil && strings.HasPrefix(o.format, "table"):
		lines := []string{headings[T](tmpl)}
		for _, row := range rows {
			line, err := execute(tmpl, row)
			if err != nil {
				return err
			}
			lines = append(lines, line)
		}
		return tabbed(w, lines)
	case tmpl != nil:
		for _, row := range rows {
			line, err := execute(tmpl, row)
			if err != nil {
				return err
			}
			fmt.Fprintln(w, line)
		}
	default:
		lines := []string{l.header}
		for _, row := range rows {
			lines = append(lines, l.row(row))
		}
		return table(w, lines, o.whole)
	}
	return nil
}

func execute[T any](tmpl *template.Template, row T) (string, error) {
	var b strings.Builder
	if err := tmpl.Execute(&b, row); err != nil {
		return "", fmt.Errorf("--format cannot be used here: %w; there are %s", err, strings.Join(fields[T](), ", "))
	}
	return b.String(), nil
}

func fields[T any]() (names []string) {
	for field := range reflect.TypeFor[T]().Fields() {
		names = append(names, "."+field.Name)
	}
	return names
}

// headings is what a template makes of the names of the fields.
func headings[T any](tmpl *template.Template) string {
	names := map[string]string{}
	for _, field := range fields[T]() {
		names[field[1:]] = strings.ToUpper(field[1:])
	}
	var b strings.Builder
	_ = tmpl.Execute(&b, names) // what cannot be done with a name is left out
	return b.String()
}

func tabbed(w io.Writer, lines []string) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	for _, line := range lines {
		fmt.Fprintln(t, line)
	}
	if err := t.Flush(); err != nil {
		return &failure{fmt.Errorf("print the table: %w", err)}
	}
	return nil
}

// table prints lines, words between tabs, in columns. If that is too wide, the
// columns come closer, and then the widest of them are cut.
func table(w io.Writer, lines []string, whole bool) error {
	rows := make([][]string, len(lines))
	var widths []int
	for i, line := range lines {
		rows[i] = strings.Split(line, "\t")
		widths = append(widths, make([]int, max(0, len(rows[i])-len(widths)))...)
		for j, cell := range rows[i] {
			widths[j] = max(widths[j], cells(cell))
		}
	}
	gap := 3
	wide := func() int {
		sum := gap * (len(widths) - 1)
		for _, width := range widths {
			sum += width
		}
		return sum
	}
	if wide() > columns && !whole {
		gap = 2
		for wide() > columns {
			widest := 0
			for j, width := range widths {
				if width >= widths[widest] { // of two, the one on the right
					widest = j
				}
			}
			if widths[widest] <= 4 {
				break
			}
			widths[widest]--
		}
	}
	var b strings.Builder
	for _, row := range rows {
		var line strings.Builder
		for j, cell := range row {
			if length := cells(cell); length > widths[j] {
				cell = string([]rune(cell)[:widths[j]-1]) + "…"
			}
			line.WriteString(cell + strings.Repeat(" ", gap+widths[j]-cells(cell)))
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	if _, err := io.WriteString(w, b.String()); err != nil {
		return &failure{fmt.Errorf("print the table: %w", err)}
	}
	return nil
}

// cells is how many of a terminal's a text takes; flockerctl's signs take two.
func cells(text string) int {
	return utf8.RuneCountInString(text) + strings.Count(text, "✅") + strings.Count(text, "⌛")
}

// size is bytes as people say them: 10GiB, 1.5GiB.
func size(bytes int64) string {
	if bytes < 0 {
		return fmt.Sprintf("%dB", bytes)
	}
	units, n := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"}, float64(bytes)
	i := 0
	for n >= 1024 && i < len(units)-1 {
		n, i = n/1024, i+1
	}
	if rounded := math.Round(n*10) / 10; rounded != math.Trunc(rounded) {
		return fmt.Sprintf("%.1f%s", rounded, units[i])
	}
	return fmt.Sprintf("%.0f%s", n, units[i])
}

// counts is how many there are of each, "3: 2 live, 1 silent"; the most first.
func counts(of map[string]int) string {
	kinds, sum := []string{}, 0
	for kind, n := range of {
		kinds, sum = append(kinds, kind), sum+n
	}
	slices.SortFunc(kinds, func(a, b string) int {
		if of[a] != of[b] {
			return of[b] - of[a]
		}
		return strings.Compare(a, b)
	})
	for i, kind := range kinds {
		kinds[i] = fmt.Sprintf("%d %s", of[kind], kind)
	}
	if sum == 0 {
		return "none"
	}
	return fmt.Sprintf("%d: %s", sum, strings.Join(kinds, ", "))
}

// wrap breaks a sentence into lines that fit behind the indent, which all but the
// first begin with.
func wrap(text, indent string) string {
	var b strings.Builder
	length := len(indent)
	for i, word := range strings.Fields(text) {
		n := utf8.RuneCountInString(word)
		switch {
		case i == 0:
		case length+1+n > columns:
			b.WriteString("\n" + indent)
			length = len(indent)
		default:
			b.WriteString(" ")
			length++
		}
		b.WriteString(word)
		length += n
	}
	return b.String()
}
