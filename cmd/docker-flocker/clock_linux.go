package main

import "syscall"

const unsynchronized = 0x40 // STA_UNSYNC, which package syscall lacks

// adrift says that the kernel knows of nobody who keeps its clock right.
func adrift() bool {
	var clock syscall.Timex
	state, err := syscall.Adjtimex(&clock)
	return err == nil && (state == 5 || clock.Status&unsynchronized != 0) // TIME_ERROR
}
