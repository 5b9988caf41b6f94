package certs

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"time"
)

// Soon is how long before its end a certificate is warned of.
const Soon = 30 * 24 * time.Hour

// Expiry is when what is in a file is no longer good.
type Expiry struct {
	File string
	At   time.Time
}

// Expiries are those of the certificates in files. Of several authorities in one file the
// last one counts: the others are to go. What cannot be read is left out, for whoever needs
// it says so.
func Expiries(files ...string) (all []Expiry) {
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		var at time.Time
		for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				continue
			}
			if cert.NotAfter.After(at) {
				at = cert.NotAfter
			}
			if !cert.IsCA { // what follows is between it and its authority
				at = cert.NotAfter
				break
			}
		}
		if !at.IsZero() {
			all = append(all, Expiry{file, at})
		}
	}
	return all
}

// Warning is a sentence about a certificate that has ended, or will within Soon; "" if
// there is time.
func (e Expiry) Warning(now time.Time) string {
	left := e.At.Sub(now)
	switch {
	case left <= 0:
		return fmt.Sprintf("the certificate %s has expired on %s", e.File, day(e.At))
	case left < 48*time.Hour:
		return fmt.Sprintf("the certificate %s expires at %s", e.File, e.At.UTC().Format(time.RFC3339))
	case left < Soon:
		return fmt.Sprintf("the certificate %s expires on %s, in %d days", e.File, day(e.At), int(left/(24*time.Hour)))
	}
	return ""
}

// Renewal is what to do about a Warning.
const Renewal = "make another with docker flocker ca: docs/cli.md, New certificates"
