package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/flocker-plugin/flocker/e2e/rig"
)

// others are volumes beside the workload, which are made, used, looked at and
// removed all the time, on hosts that are broken or not. That a command fails proves
// nothing then; it must end, and nothing may be left at the end.
type others struct {
	done, failed int
	// slowest is the longest that one of the commands took.
	slowest time.Duration
	what    string
	// hung are those that did not end.
	hung []string
}

// hangs is when a command counts as one that does not end. A Mount may take 110 s, and
// then there is the container.
const hangs = 150 * time.Second

// otherVolumes is how many names there are, and otherLabel what their containers have.
const (
	otherVolumes = 4
	otherLabel   = "chaos.other"
)

func (o *others) comeAndGo(ctx context.Context, r *run) {
	random := rand.New(rand.NewPCG(r.seed, 1))
	for sleep(ctx, 200*time.Millisecond+time.Duration(random.Int64N(int64(2*time.Second)))) == nil {
		h := r.hosts[random.IntN(len(r.hosts))]
		other := fmt.Sprintf("other%d", random.IntN(otherVolumes))
		v := r.volumes[random.IntN(len(r.volumes))]
		commands := [][]string{
			{"volume", "ls", "-q"},
			{"volume", "inspect", v.name},
			{"volume", "inspect", other},
			{"volume", "create", "--driver", "flocker", "--opt", "size=64M", "--opt", "backend=" + v.backend, other},
			append([]string{"run", "--rm", "--label", otherLabel}, r.lookArgs(other, "/dev/null")...),
			{"volume", "rm", other},
		}
		args := commands[random.IntN(len(commands))]
		began := time.Now()
		running, cancel := context.WithTimeout(ctx, hangs)
		_, err := h.Docker(running, args...)
		hung := running.Err() != nil
		cancel()
		if ctx.Err() != nil {
			return
		}
		if o.done++; err != nil {
			o.failed++
		}
		if hung {
			o.hung = append(o.hung, h.Name+": docker "+strings.Join(args, " "))
		}
		if took := time.Since(began); took > o.slowest {
			o.slowest, o.what = took, strings.Join(args[:2], " ")+" on "+h.Name
		}
	}
}

// lookArgs are the arguments of a docker run that looks at what is on a volume and
// copies it to a file.
func (r *run) lookArgs(volume, file string) []string {
	return []string{
		"--mount", "type=volume,volume-driver=flocker,dst=/data,src=" + volume,
		"--mount", "type=bind,dst=/witness,src=" + r.witness.dir,
		"--mount", "type=bind,dst=/final,src=" + r.final(""),
		"--env", "NODE=look", image, "-volume", volume, "-copy", file,
	}
}

// removeAll removes them from every host's Docker, and so all that is left of them.
func (o *others) removeAll(ctx context.Context, hosts []*rig.Host) error {
	var last error
	for range 30 {
		last = nil
		for _, h := range hosts {
			for n := range otherVolumes {
				if _, err := h.Docker(ctx, "volume", "rm", "-f", fmt.Sprintf("other%d", n)); err != nil {
					last = err
				}
			}
		}
		if last == nil {
			return nil
		}
		if err := sleep(ctx, 3*time.Second); err != nil {
			return err
		}
	}
	return last
}
