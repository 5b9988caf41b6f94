//go:build !linux

package main

// adrift is only known of Linux.
func adrift() bool { return false }
