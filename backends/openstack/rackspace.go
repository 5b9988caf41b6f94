package openstack

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/gophercloud/gophercloud/v2"

	"github.com/flocker-plugin/flocker/backends"
)

// rackspaceURL is where Rackspace's users log in.
const rackspaceURL = "https://identity.api.rackspacecloud.com/v2.0"

// Rackspace is the backend of a node that is a server of Rackspace's first cloud: Nova, and
// Cinder's API of version 1 (see v1.go), which grows nothing.
type Rackspace struct {
	backends.Backend
	backends.Fencer
	backends.Identifier
}

func (c Config) rackspace() bool { return c.Auth == "rackspace" }

// checkRackspace looks at what is particular to auth: rackspace.
func (c Config) checkRackspace() error {
	for key, set := range map[string]bool{
		"cloud": c.Cloud != "", "clouds_file": c.CloudsFile != "", "user_domain": c.UserDomain != "", "password_file": c.PasswordFile != "",
		"project_name": c.ProjectName != "", "project_domain": c.ProjectDomain != "", "project_id": c.ProjectID != "",
		"application_credential_id": c.ApplicationCredentialID != "", "application_credential_secret_file": c.ApplicationCredentialSecretFile != "",
		"cinder_url": c.CinderURL != "", "shares": len(c.Shares) > 0, "ceph_user": c.CephUser != "", "iscsi": c.ISCSI,
		"grow_attached": c.GrowAttached, "allow_admin_fence": c.AllowAdminFence,
	} {
		if set {
			return fmt.Errorf("%s is nothing for auth: rackspace", key)
		}
	}
	switch {
	case c.Username == "" || c.APIKeyFile == "" || c.Region == "":
		return fmt.Errorf("auth: rackspace needs username, api_key_file and region, such as DFW")
	case c.AuthURL != "" && !isURL(c.AuthURL):
		return fmt.Errorf("auth_url %q is no URL; leave it out, or write it like %s", c.AuthURL, rackspaceURL)
	case c.Attach == "connector":
		return fmt.Errorf("auth: rackspace needs attach: nova")
	case c.Interface == "admin":
		return fmt.Errorf("interface is %q; with auth: rackspace use public or internal", c.Interface)
	}
	return nil
}

// access is what Rackspace says to whom it lets in. It is no catalog of Keystone's present
// versions, and gophercloud knows its services by other types.
type access struct {
	Access struct {
		Token struct {
			ID string `json:"id"`
		} `json:"token"`
		Catalog []struct {
			Name      string `json:"name"`
			Endpoints []struct {
				Region   string `json:"region"`
				Public   string `json:"publicURL"`
				Internal string `json:"internalURL"`
			} `json:"endpoints"`
		} `json:"serviceCatalog"`
	} `json:"access"`
}

// ExtractTokenID implements gophercloud.AuthResult.
func (a *access) ExtractTokenID() (string, error) { return a.Access.Token.ID, nil }

// loginRackspace logs in with a key, and again with what the file says then whenever the token has expired.
func (c Config) loginRackspace(ctx context.Context) (*conn, error) {
	client, err := httpClient(nil, c.CAFile)
	if err != nil {
		return nil, backends.Classify(backends.ErrUnavailable, err)
	}
	got, err := c.enter(ctx, client)
	if err != nil {
		return nil, err
	}
	provider := &gophercloud.ProviderClient{HTTPClient: client}
	provider.UseTokenLock()
	if err := provider.SetTokenAndAuthResult(got); err != nil {
		return nil, err
	}
	provider.ReauthFunc = func(ctx context.Context) error {
		got, err := c.enter(ctx, client)
		if err != nil {
			return err
		}
		return provider.SetTokenAndAuthResult(got)
	}
	conn := &conn{}
	for _, s := range []struct {
		name string
		into **gophercloud.ServiceClient
	}{{"cloudBlockStorage", &conn.volume}, {"cloudServersOpenStack", &conn.compute}} {
		url, err := c.endpoint(got, s.name)
		if err != nil {
			return nil, err
		}
		*s.into = &gophercloud.ServiceClient{ProviderClient: provider, Endpoint: gophercloud.NormalizeURL(url)}
	}
	return conn, nil
}

// enter exchanges the key for a token.
func (c Config) enter(ctx context.Context, client http.Client) (*access, error) {
	key, err := secret(c.APIKeyFile)
	if err != nil {
		return nil, backends.Classify(backends.ErrUnavailable, err)
	}
	base := strings.TrimSuffix(cmp.Or(c.AuthURL, rackspaceURL), "/")
	got := &access{}
	stranger := &gophercloud.ProviderClient{HTTPClient: client}
	_, err = stranger.Request(ctx, http.MethodPost, base+"/tokens", &gophercloud.RequestOpts{ //nolint:bodyclose // Request has closed it
		JSONBody: map[string]any{"auth": map[string]any{"RAX-KSKEY:apiKeyCredentials": map[string]string{"username": c.Username, "apiKey": key}}},
		OkCodes:  []int{http.StatusOK, http.StatusNonAuthoritativeInfo}, JSONResponse: got,
	})
	if err != nil {
		return nil, c.loginError(ctx, base, err, key)
	}
	if got.Access.Token.ID == "" {
		return nil, fmt.Errorf("%s at %s has answered without a token: check auth_url: %w", c.keystone(), base, backends.ErrUnavailable)
	}
	return got, nil
}

// endpoint is where a service of the region is.
func (c Config) endpoint(got *access, name string) (string, error) {
	var regions []string
	for _, service := range got.Access.Catalog {
		if service.Name != name {
			continue
		}
		for _, e := range service.Endpoints {
			url := e.Public
			if c.Interface == "internal" {
				url = e.Internal
			}
			switch {
			case url == "":
			case e.Region == c.Region:
				return url, nil
			case !slices.Contains(regions, e.Region):
				regions = append(regions, e.Region)
			}
		}
	}
	where := "nowhere"
	if len(regions) > 0 {
		slices.Sort(regions)
		where = "in " + strings.Join(regions, ", ")
	}
	return "", fmt.Errorf("%s's catalog has no %s with interface %s in region %q, but %s; check region and interface: %w",
		c.keystone(), name, cmp.Or(c.Interface, "public"), c.Region, where, backends.ErrUnavailable)
}
