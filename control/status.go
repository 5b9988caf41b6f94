package control

import (
	"context"
	"errors"
	"net/http"

	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

// Status is the HTTP status that says of what kind an error of the driver's, or of the
// map's, is: on the control socket, and over the REST API.
func Status(err error) int {
	switch {
	case is[*driver.InvalidError](err):
		return http.StatusBadRequest
	case errors.Is(err, ownership.ErrNotFound), is[*ownership.NoHostError](err):
		return http.StatusNotFound
	case is[*ownership.GoneError](err):
		return http.StatusGone
	case errors.Is(err, ownership.ErrUnavailable), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return http.StatusServiceUnavailable
	case errors.Is(err, ownership.ErrConflict), is[*ownership.LiveError](err), is[*ownership.BusyError](err),
		is[*ownership.HeldError](err), is[*ownership.PhaseError](err), is[*ownership.LeasedError](err):
		return http.StatusConflict
	}
	return http.StatusInternalServerError
}

func is[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}
