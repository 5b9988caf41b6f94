package qsd

// QMP has a test of its own.
var QMP = qmp
