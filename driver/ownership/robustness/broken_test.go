package robustness

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/flocker-plugin/flocker/driver/ownership"
)

// broken is a Store with a defect in its transactions.
type broken struct {
	ownership.Store

	txn transact
}

// transact does a transaction with a store.
type transact func(ctx context.Context, s ownership.Store, txn ownership.Txn) (ownership.TxnResult, error)

func (b broken) Txn(ctx context.Context, txn ownership.Txn) (ownership.TxnResult, error) {
	return b.txn(ctx, b.Store, txn)
}

// onOwner are the compares of the own key.
func onOwner(c ownership.Cmp) bool { return strings.Contains(c.Key, "/v1/own/") }

// does says whether a transaction does that to an own key, if its compares hold.
func does(txn ownership.Txn, kind ownership.OpKind) bool {
	return slices.ContainsFunc(txn.Then, func(op ownership.Op) bool {
		return op.Kind == kind && strings.Contains(op.Key, "/v1/own/")
	})
}

// uncompared leaves out the compare of the own key where that is done, by the name
// it has in the audit lines.
func uncompared(what string) transact {
	line := fmt.Appendf(nil, `"what":%q`, what)
	return func(ctx context.Context, s ownership.Store, txn ownership.Txn) (ownership.TxnResult, error) {
		if slices.ContainsFunc(txn.Then, func(op ownership.Op) bool { return bytes.Contains(op.Value, line) }) {
			txn.If = slices.DeleteFunc(slices.Clone(txn.If), onOwner)
		}
		return s.Txn(ctx, txn)
	}
}

// sometimes keeps most calls as they should be, so that a defect is not seen at
// once.
func sometimes() bool { return rand.IntN(3) == 0 }

// defects are what a store, or a careless rewrite of the map's transactions, could
// do wrong. Each makes the txn of a node.
var defects = []struct {
	name string
	txn  func() transact
}{
	{"a failed compare is a success", func() transact {
		return func(ctx context.Context, s ownership.Store, txn ownership.Txn) (ownership.TxnResult, error) {
			res, err := s.Txn(ctx, txn)
			if err == nil && !res.Succeeded && (does(txn, ownership.OpPut) || does(txn, ownership.OpDelete)) && sometimes() {
				res.Succeeded = true
				if len(res.Results) == 1 { // the nested release of a hand-over
					res.Results = nil
				}
			}
			return res, err
		}
	}},
	{"a release does not compare", func() transact {
		return func(ctx context.Context, s ownership.Store, txn ownership.Txn) (ownership.TxnResult, error) {
			if does(txn, ownership.OpDelete) {
				txn.If = slices.DeleteFunc(slices.Clone(txn.If), onOwner)
			}
			return s.Txn(ctx, txn)
		}
	}},
	{"a retake does not compare", func() transact { return uncompared("retake") }},
	{"a hand-over does not compare", func() transact { return uncompared("hand over") }},
	{"a takeover does not compare", func() transact { return uncompared("take over") }},
	{"a takeover's end does not compare", func() transact { return uncompared("fenced") }},
	{"compared by a read before", func() transact {
		return func(ctx context.Context, s ownership.Store, txn ownership.Txn) (ownership.TxnResult, error) {
			if !does(txn, ownership.OpPut) {
				return s.Txn(ctx, txn)
			}
			read := []ownership.Op{{Kind: ownership.OpGet, Key: "x"}}
			before, err := s.Txn(ctx, ownership.Txn{If: txn.If, Then: read, Else: read})
			if err != nil {
				return before, err
			}
			time.Sleep(rand.N(5 * time.Millisecond))
			if !before.Succeeded {
				return s.Txn(ctx, ownership.Txn{If: []ownership.Cmp{{Key: "never", Not: true}}, Else: txn.Else})
			}
			txn.If = nil
			return s.Txn(ctx, txn)
		}
	}},
	{"reads are old", func() transact {
		var mu sync.Mutex
		kept := map[string]ownership.TxnResult{}
		return func(ctx context.Context, s ownership.Store, txn ownership.Txn) (ownership.TxnResult, error) {
			if len(txn.If) > 0 || len(txn.Then) == 0 || !strings.Contains(txn.Then[len(txn.Then)-1].Key, "/v1/own/") || txn.Then[0].Kind != ownership.OpGet {
				return s.Txn(ctx, txn)
			}
			key := txn.Then[len(txn.Then)-1].Key
			mu.Lock()
			defer mu.Unlock()
			if old, ok := kept[key]; ok && sometimes() {
				now, err := s.Txn(ctx, ownership.Txn{Then: []ownership.Op{{Kind: ownership.OpGet, Key: "x"}}})
				old.Revision = now.Revision // or the node would notice
				return old, err
			}
			res, err := s.Txn(ctx, txn)
			if err == nil {
				kept[key] = res
			}
			return res, err
		}
	}},
	{"a write is lost", func() transact {
		return func(ctx context.Context, s ownership.Store, txn ownership.Txn) (ownership.TxnResult, error) {
			if does(txn, ownership.OpPut) && rand.IntN(10) == 0 {
				reads := slices.DeleteFunc(slices.Clone(txn.Then), func(op ownership.Op) bool { return op.Kind != ownership.OpGet })
				res, err := s.Txn(ctx, ownership.Txn{If: txn.If, Then: reads, Else: txn.Else})
				if err == nil && res.Succeeded {
					res.Results = append([]ownership.OpResult{{}}, res.Results...)
					res.Revision++
				}
				return res, err
			}
			return s.Txn(ctx, txn)
		}
	}},
	{"tokens stay", func() transact {
		return func(ctx context.Context, s ownership.Store, txn ownership.Txn) (ownership.TxnResult, error) {
			res, err := s.Txn(ctx, txn)
			if err == nil && res.Succeeded && does(txn, ownership.OpPut) && sometimes() {
				res.Revision--
			}
			return res, err
		}
	}},
}

// TestChecker has nodes on stores with a defect each; the histories that come of
// it must be rejected, and those of the same stores without must not.
func TestChecker(t *testing.T) {
	if testing.Short() {
		t.Skip("takes many seconds")
	}
	seed := chosenSeed(t)
	t.Run("no defect", func(t *testing.T) {
		t.Parallel()
		w := fightInMemory(t, seed, func(s ownership.Store) ownership.Store { return s })
		w.history.check(t, w.log)
	})
	for _, d := range defects {
		t.Run(d.name, func(t *testing.T) {
			t.Parallel()
			for i, end := uint64(0), time.Now().Add(30*time.Second); time.Now().Before(end); i++ {
				w := fightInMemory(t, seed+i, func(s ownership.Store) ownership.Store { return broken{Store: s, txn: d.txn()} })
				result, _ := porcupine.CheckOperationsVerbose(model, w.history.operations(w.log), 30*time.Second)
				if result == porcupine.Illegal {
					return
				}
				t.Logf("not seen in %v", w.history.tally())
			}
			t.Error("the checker does not see it")
		})
	}
}

// fightInMemory is a second of history on an etcd in memory, with lost and late
// calls.
func fightInMemory(t *testing.T, seed uint64, wrap func(ownership.Store) ownership.Store) *world {
	t.Helper()
	memory := ownership.NewMemory()
	var stores []ownership.Store
	var links []*ownership.Faults
	for range 3 {
		f := memory.Client()
		links, stores = append(links, f), append(stores, wrap(f))
	}
	w := newWorld(t, seed, "/memory", 2, memory, stores...)
	for _, f := range links {
		f.Inject(func(string) ownership.Fault {
			switch rand.IntN(30) {
			case 0:
				return ownership.Fault{DropReply: true}
			case 1:
				return ownership.Fault{Late: rand.N(100 * time.Millisecond)}
			}
			return ownership.Fault{Latency: rand.N(2 * time.Millisecond)}
		})
	}
	ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer cancel()
	go func() {
		for i := 0; ctx.Err() == nil; i++ {
			hold(ctx, 150*time.Millisecond)
			a, b := w.agents[i%len(w.agents)], w.agents[(i+1)%len(w.agents)]
			_, _ = a.now().DeclareDead(ctx, b.id, ownership.Death{Forced: true})
		}
	}()
	w.fight(ctx, 20*time.Millisecond)
	cancel()
	time.Sleep(150 * time.Millisecond) // for what is late
	if err := w.log.end(t.Context(), w.store, w.history); err != nil {
		t.Fatal(err)
	}
	return w
}
