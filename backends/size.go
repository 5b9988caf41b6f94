package backends

import (
	"fmt"
	"math/big"
	"strings"
)

// Size is a number of bytes. As text it is what `docker run --memory` takes:
// units are powers of 1024, whether written G, GB or GiB, in any case.
type Size int64

// The units of Size.
const (
	KiB Size = 1 << (10 * (iota + 1))
	MiB
	GiB
	TiB
	PiB
)

var sizeUnits = []struct {
	letter string
	size   Size
}{{"p", PiB}, {"t", TiB}, {"g", GiB}, {"m", MiB}, {"k", KiB}, {"", 1}}

const sizeAdvice = "use a number and a unit, such as 500MiB, 1G or 1.5T"

// sizeError keeps the problem and what to do about it apart, for Option.check.
type sizeError struct{ text, problem, advice string }

func (e *sizeError) Error() string {
	return fmt.Sprintf("size %s %s; %s", quoteOdd(e.text), e.problem, e.advice)
}

func (e *sizeError) Is(target error) bool { return target == ErrInvalid }

// UnmarshalText reads a size such as 500MiB, 1G or 1.5T. A part of a byte is
// dropped. It refuses what is not more than zero, and a number without a unit
// below 1 MiB: whoever writes 5 means 5G. Its errors match ErrInvalid.
func (s *Size) UnmarshalText(text []byte) error {
	n, err := parseSize(string(text))
	if err != nil {
		return err
	}
	*s = n
	return nil
}

func parseSize(text string) (Size, error) {
	end := len(text) - len(strings.TrimLeft(text, "0123456789."))
	number, unit := text[:end], strings.ToLower(strings.TrimPrefix(text[end:], " "))
	nonsense := &sizeError{text, "is not a size", sizeAdvice}
	// A number this long is nonsense, and work to compute with.
	if len(number) > 40 || !strings.ContainsAny(number, "0123456789") || strings.Count(number, ".") > 1 {
		if strings.HasPrefix(text, "-") {
			nonsense.problem = "is negative"
		}
		return 0, nonsense
	}
	bytes, ok := new(big.Rat).SetString(number)
	if !ok {
		return 0, nonsense
	}
	known := unit == "" || unit == "b"
	for _, u := range sizeUnits {
		if u.letter != "" && (unit == u.letter || unit == u.letter+"b" || unit == u.letter+"ib") {
			bytes.Mul(bytes, new(big.Rat).SetInt64(int64(u.size)))
			known = true
		}
	}
	if !known {
		return 0, nonsense
	}
	whole := new(big.Int).Quo(bytes.Num(), bytes.Denom())
	switch {
	case !whole.IsInt64():
		return 0, &sizeError{text, "is more than any storage has", sizeAdvice}
	case whole.Sign() == 0:
		return 0, &sizeError{text, "is zero", sizeAdvice}
	case unit == "" && whole.Int64() < int64(MiB):
		return 0, &sizeError{text, "has no unit", fmt.Sprintf("%s means %[1]s bytes; write %[1]sG", number)}
	}
	return Size(whole.Int64()), nil
}

// String returns the size exactly, in the largest unit that allows it: 10GiB,
// 1536MiB, 1000B. UnmarshalText reads it back.
func (s Size) String() string {
	for _, u := range sizeUnits[:len(sizeUnits)-1] {
		if s != 0 && s%u.size == 0 {
			return fmt.Sprintf("%d%siB", s/u.size, strings.ToUpper(u.letter))
		}
	}
	return fmt.Sprintf("%dB", int64(s))
}
