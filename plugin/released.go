//go:build !teststore

package main

// testBackends is empty outside of tests.
var testBackends map[string]opener
