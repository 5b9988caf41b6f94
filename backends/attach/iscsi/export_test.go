package iscsi

// Closing has a test of its own.
var Closing = closing
