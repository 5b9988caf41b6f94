package control

import (
	"context"
	"net/http"

	"github.com/sirupsen/logrus"

	"github.com/flocker-plugin/flocker/control/api"
	"github.com/flocker-plugin/flocker/driver"
	"github.com/flocker-plugin/flocker/driver/ownership"
)

func (a *Admin) create(ctx context.Context, r *http.Request) (any, error) {
	var body api.Creation
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	if err := said(body.By, "creates the volume"); err != nil {
		return nil, err
	}
	v, err := a.driver.CreateVolume(ctx, driver.CreateRequest{
		Name: body.Name, ID: body.ID, Options: body.Options, Labels: body.Labels, By: body.By,
	})
	a.changed("create", err, logrus.Fields{"volume": body.Name, "by": body.By})
	return volume(v), err
}

func (a *Admin) remove(ctx context.Context, r *http.Request) (any, error) {
	by, err := requester(r, "removes the volume")
	if err != nil {
		return nil, err
	}
	name := r.PathValue("name")
	err = a.driver.Remove(ownership.By(ctx, by), name)
	a.changed("remove", err, logrus.Fields{"volume": name, "by": by})
	return api.Done{}, err
}

func (a *Admin) move(ctx context.Context, r *http.Request) (any, error) {
	var body api.Movement
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	if err := said(body.By, "moves the volume"); err != nil {
		return nil, err
	}
	if body.Host == nil {
		return nil, badRequest(`host is missing: say where the volume is to be; "" is nowhere`)
	}
	name := r.PathValue("name")
	p, err := a.driver.Move(ctx, name, *body.Host, body.By)
	a.changed("move", err, logrus.Fields{"volume": name, "host": *body.Host, "by": body.By})
	return api.Moved{Volume: name, Host: p.Host, Node: p.Node}, err
}

func (a *Admin) cordon(ctx context.Context, r *http.Request) (any, error) {
	return a.setCordon(ctx, r, "cordon", "cordons the host", true)
}

func (a *Admin) uncordon(ctx context.Context, r *http.Request) (any, error) {
	return a.setCordon(ctx, r, "uncordon", "uncordons the host", false)
}

func (a *Admin) setCordon(ctx context.Context, r *http.Request, op, does string, on bool) (any, error) {
	by, err := requester(r, does)
	if err != nil {
		return nil, err
	}
	host := r.PathValue("host")
	err = a.driver.Cordon(ctx, host, by, on)
	a.changed(op, err, logrus.Fields{"host": host, "by": by})
	return api.Done{}, err
}

func (a *Admin) drain(ctx context.Context, r *http.Request) (any, error) {
	by, err := requester(r, "drains the host")
	if err != nil {
		return nil, err
	}
	host := r.PathValue("host")
	got, err := a.driver.Drain(ownership.By(ctx, by), host, by)
	a.changed("drain", err, logrus.Fields{"host": host, "by": by})
	answer := api.Drained{Released: append([]string{}, got.Released...), Moving: append([]string{}, got.Moving...), Busy: []api.Busy{}}
	for _, b := range got.Busy {
		answer.Busy = append(answer.Busy, api.Busy{Volume: b.Name, Containers: b.Containers, Detail: b.Detail})
	}
	return answer, err
}

func (a *Admin) removeNode(ctx context.Context, r *http.Request) (any, error) {
	by, err := requester(r, "removes the host")
	if err != nil {
		return nil, err
	}
	host := r.PathValue("host")
	err = a.driver.RemoveNode(ctx, host, by)
	a.changed("remove node", err, logrus.Fields{"host": host, "by": by})
	return api.Done{}, err
}

// requester reads a body that says no more than who wants it.
func requester(r *http.Request, does string) (string, error) {
	var body api.By
	if err := decode(r, &body); err != nil {
		return "", err
	}
	return body.By, said(body.By, does)
}
