package mount_test

import (
	"os"
	"testing"

	"github.com/flocker-plugin/flocker/e2e/apart"
)

func TestMain(m *testing.M) { os.Exit(apart.Main(m)) }
