package ebs_test

import (
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/flocker-plugin/flocker/backends/ebs"
)

// The policy of the documentation allows what the backend calls, and nothing else.
func TestPolicy(t *testing.T) {
	text, err := os.ReadFile("../../docs/backends/ebs.md")
	if err != nil {
		t.Fatal(err)
	}
	_, policy, _ := strings.Cut(string(text), "```json\n")
	policy, _, _ = strings.Cut(policy, "```\n")
	var doc struct{ Statement []struct{ Action any } }
	if err := json.Unmarshal([]byte(policy), &doc); err != nil {
		t.Fatal(err)
	}
	var allowed []string
	for _, s := range doc.Statement {
		actions, several := s.Action.([]any)
		if !several {
			actions = []any{s.Action}
		}
		for _, action := range actions {
			call, ok := strings.CutPrefix(action.(string), "ec2:")
			if !ok {
				t.Errorf("%v is no call of EC2", action)
			}
			allowed = append(allowed, call)
		}
	}
	slices.Sort(allowed)
	if got, want := slices.Compact(allowed), ebs.Calls(); !slices.Equal(got, want) {
		t.Errorf("it allows %q, and the backend calls %q", got, want)
	}
}
