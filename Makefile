# Needs Go and make; `make deps` installs the rest on a Debian machine.

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo development)
CACHE   ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/flocker
BIN     := $(CACHE)/bin
# The test rig looks for Engine 29 and Compose there.
export RIG_BIN := $(BIN)

# Tools, built from source with Go and kept out of go.mod.
DOCKERD  := v2.0.0-beta.24
RUNC     := v1.5.2
COMPOSE  := v5.0.2
GOLANGCI := v2.12.2

# Debian packages: of the tests and the demo, and of the plugin's root file system.
PACKAGES := btrfs-progs busybox-static ca-certificates containerd curl docker-compose docker.io \
	e2fsprogs gcc git iproute2 iptables kmod libc6-dev libnbd-bin libseccomp-dev mmdebstrap nbdkit \
	pkg-config procps tini util-linux xfsprogs
ROOTFS := btrfs-progs busybox-static ca-certificates e2fsprogs mount util-linux xfsprogs
DEBIAN := bookworm

# Tests that need one of root,docker,etcd fail instead of being skipped if it is here.
export REQUIRE ?= $(if $(CI),root$(comma)docker$(comma)etcd)
comma := ,

.DEFAULT_GOAL := help
.PHONY: help
help: ## print this
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

.PHONY: build
build: ## the binaries: build/flocker-plugin, and build/docker-flocker for the command line
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o build/flocker-plugin ./plugin
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o build/docker-flocker ./cmd/docker-flocker

.PHONY: plugin
plugin: build ## the managed plugin, build/plugin; BASE=debian:12-slim makes it with docker build
ifdef BASE
	rm -rf build/plugin && mkdir -p build/plugin/rootfs
	docker build --build-arg BASE=$(BASE) --tag flocker-rootfs .
	set -e; container=$$(docker create flocker-rootfs true); \
		docker export --output build/rootfs.tar $$container; docker rm $$container >/dev/null
	tar -x -C build/plugin/rootfs --exclude='dev/*' --exclude=.dockerenv --exclude=etc/hostname \
		--exclude=etc/hosts --exclude=etc/mtab --exclude=etc/resolv.conf -f build/rootfs.tar
	rm build/rootfs.tar
else
	$(MAKE) --no-print-directory base
	rm -rf build/plugin && mkdir -p build/plugin
	cp -a $(BASEDIR) build/plugin/rootfs
	cp build/flocker-plugin build/plugin/rootfs/usr/bin/
endif
	cp config.json build/plugin/

.PHONY: plugin-teststore
plugin-teststore: plugin ## the managed plugin with the test storage as well, build/plugin-teststore
	rm -rf build/plugin-teststore
	cp -al build/plugin build/plugin-teststore
	rm build/plugin-teststore/rootfs/usr/bin/flocker-plugin
	CGO_ENABLED=0 $(GO) build -trimpath -tags teststore -ldflags '-s -w -X main.version=$(VERSION)' \
		-o build/plugin-teststore/rootfs/usr/bin/flocker-plugin ./plugin

# A new rootfs.sh or package list is a new base.
BASEDIR = $(CACHE)/base-$(DEBIAN)-$(shell (echo $(ROOTFS); cat plugin/rootfs.sh) | cksum | cut -d' ' -f1)

.PHONY: base
base: ## the plugin's root file system from Debian packages, where no registry can be reached
	@[ -d $(BASEDIR) ] || { set -e; \
		tmp=$$(mktemp -d); trap 'rm -rf $$tmp' EXIT; mkdir -p $(CACHE) $$tmp/debian; \
		timeout 600 mmdebstrap --quiet --variant=extract --include="$(ROOTFS)" $(DEBIAN) $$tmp/debian.tar; \
		tar -x -C $$tmp/debian --exclude='./dev/*' -f $$tmp/debian.tar; \
		sh plugin/rootfs.sh $$tmp/debian $$tmp/rootfs; \
		rm -rf $(CACHE)/base-*; cp -a $$tmp/rootfs $(BASEDIR).new; mv $(BASEDIR).new $(BASEDIR); }

.PHONY: install
install: plugin ## enable the plugin on this machine's Docker, and docker flocker; FLOCKER_… variables are its settings
	$(GO) run ./e2e/install

.PHONY: uninstall
uninstall: ## remove the plugin and docker flocker; volumes and state stay in /var/lib/flocker
	$(GO) run ./e2e/install -uninstall

.PHONY: demo
demo: deps plugin ## a volume follows its container between two Docker hosts on this machine
	$(GO) run ./e2e/demo

.PHONY: hosts
hosts: deps plugin ## Docker hosts to try things out on; ARGS='-n 2 -engine 29' and the like
	$(GO) run ./e2e/hosts $(ARGS)

.PHONY: bench
bench: deps plugin ## how fast it is, beside Docker's local driver and the bare system calls
	$(GO) run ./e2e/bench

.PHONY: bench-attach
bench-attach: ## what a Mount adds to what the storage takes, as root; on an idle machine
	$(GO) test ./plugin -run '^$$' -bench BenchmarkMount -benchtime 300x -count 3

.PHONY: bench-api
bench-api: ## the REST API of a host with 10,000 volumes, over TLS
	$(GO) test ./control/rest -run '^$$' -bench . -benchtime 300x

.PHONY: bench-takeover
bench-takeover: deps plugin-teststore ## how long a volume is not written to when its host is killed; KILLS=20
	$(GO) run ./e2e/bench -takeover $(or $(KILLS),20) $(ARGS)

.PHONY: bench-ceph
bench-ceph: ## what Flocker adds to the time a real Ceph takes until a volume is mounted (minutes, as root); ROUNDS=30
	$(MAKE) --no-print-directory deps PACKAGES='$(CEPH)'
	$(GO) run ./e2e/bench -ceph $(or $(ROUNDS),30) $(ARGS)

# The linter's own cache remembers findings by the path of another work tree.
check: export GOLANGCI_LINT_CACHE := $(CURDIR)/build/lint-cache

.PHONY: check
check: lint ## formatting, vet, linters, go.mod
	$(BIN)/golangci-lint fmt --diff
	$(GO) vet -tags e2e ./...
	$(BIN)/golangci-lint run
	$(GO) mod tidy -diff
	$(GO) fix -tags e2e -diff ./...
	for dir in $(MODULES); do (cd $$dir && $(GO) vet ./... && $(GO) mod tidy -diff) || exit; done

# Test modules of their own, for what must not be in go.mod.
MODULES = $(patsubst %/go.mod,%,$(shell find . -mindepth 2 -name go.mod -not -path './build/*'))

.PHONY: test
test: deps engine plugin-teststore ## everything, with what it needs
	$(MAKE) --no-print-directory test-unit test-e2e

# The packages whose tests have devices and mounts, which are the machine's: one at a time,
# beside one of the others.
DEVICES := /(backends|driver/mount|plugin|e2e)(/|$$)

.PHONY: test-unit
test-unit: ## all but the tests with Docker hosts
	$(MAKE) --no-print-directory -j 2 test-devices test-others
	for dir in $(MODULES); do (cd $$dir && $(GO) test -race -count 1 -timeout 10m ./...) || exit; done

.PHONY: test-devices
test-devices:
	$(GO) test -race -timeout 15m -p 1 $$($(GO) list ./... | grep -E '$(DEVICES)' | grep -v -e /backends/ebs -e /backends/rbd/cephtest -e /e2e/vm)

.PHONY: test-others
test-others:
	$(GO) test -race -timeout 15m -p 1 $$($(GO) list ./... | grep -v -E '$(DEVICES)')

.PHONY: test-csi
test-csi: ## the CSI backend on a strict driver, which csi-sanity judges, and on drivers that others wrote (minutes, as root)
	$(GO) test -race -count 1 -timeout 15m ./backends/csi/...
	cd backends/csi/sanity && $(GO) test -race -count 1 -timeout 10m ./...

.PHONY: test-ebs
test-ebs: ## the EBS backend on an imitation of EC2, which boto3 judges (minutes)
	$(MAKE) --no-print-directory deps PACKAGES=python3-boto3
	$(GO) test -race -count 1 -timeout 15m ./backends/ebs/...

# OpenStack for the tests of its backend, and what it needs.
OPENSTACK := cinder-api cinder-scheduler cinder-volume rabbitmq-server qemu-utils python3-pymysql \
	keystone placement-api nova-api nova-conductor nova-scheduler nova-compute mariadb-server python3-rados python3-rbd

.PHONY: test-openstack
test-openstack: ## the OpenStack backend on real services, of Debian's packages (many minutes, as root); RUN=TestName
	$(MAKE) --no-print-directory deps PACKAGES="$(OPENSTACK) $(CEPH) $(ISCSI)"
	OPENSTACK=real REQUIRE=root,ceph,iscsi $(GO) test -race -count 1 -v -timeout 90m -p 1 $(if $(RUN),-run '$(RUN)') ./backends/attach/iscsi ./backends/openstack

# An iSCSI target in user space, and what attaches its units.
ISCSI := qemu-block-extra qemu-system-common tgt

# What a Ceph cluster of its own needs, and what attaches its images.
CEPH := ceph-common ceph-mon ceph-osd qemu-block-extra qemu-system-common

.PHONY: test-ceph
test-ceph: ## the RBD backend on a real Ceph cluster, which it starts and removes, as root (minutes); RUN=TestName
	$(MAKE) --no-print-directory deps PACKAGES='$(CEPH)'
	REQUIRE=root,ceph $(GO) test -race -count 1 -v -timeout 90m $(if $(RUN),-run '$(RUN)') ./backends/rbd/... ./backends/attach/...

.PHONY: test-ceph-hosts
test-ceph-hosts: deps build ## Docker hosts with volumes in a real Ceph cluster: moves, a drained node, hosts that are cut off or killed (many minutes, as root)
	$(MAKE) --no-print-directory deps PACKAGES='$(CEPH)'
	REQUIRE=root,docker,ceph $(GO) test -race -tags e2e -count 1 -v -timeout 60m -run TestCeph ./e2e

# What runs a virtual machine. Its kernel is unpacked, and not installed.
VM     := dpkg iproute2 kmod open-iscsi qemu-system-x86 rbd-nbd tgt udev $(CEPH)
KERNEL := $(CACHE)/kernel-$(DEBIAN)

.PHONY: test-vm
test-vm: ## backends in virtual machines: disks that come and go, the kernel's own drivers for Ceph and iSCSI (as root, half an hour and more); RUN=TestName
	$(MAKE) --no-print-directory deps PACKAGES='$(VM)'
	$(MAKE) --no-print-directory kernel
	CGO_ENABLED=0 VM_KERNEL=$(KERNEL) REQUIRE=vm,root,ceph,iscsi $(GO) test -count 1 -v -timeout 90m $(if $(RUN),-run '$(RUN)') ./e2e/vm

.PHONY: kernel
kernel:
	@[ -d $(KERNEL) ] || { set -e; \
		tmp=$$(mktemp -d); trap 'rm -rf $$tmp' EXIT; cd $$tmp; mkdir root; \
		get() { timeout 900 apt-get -qq -o Acquire::Retries=3 -o APT::Sandbox::User=root download \
			$$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-.*\)/\1/p'); }; \
		get 2>/dev/null || { timeout 900 apt-get -qq update && get; }; \
		dpkg-deb --fsys-tarfile linux-image-*.deb | tar -x -C root --wildcards './boot/vmlinuz-*' './lib/modules'; \
		depmod -b root $$(ls root/lib/modules); \
		mkdir -p $(CACHE); cp -a root $(KERNEL).new; mv $(KERNEL).new $(KERNEL); }

.PHONY: test-e2e
test-e2e: deps engine plugin-teststore ## the tests with Docker hosts; RUN=TestName for some of them
	@mkdir -p build
	@# What failed once more at the end: the daemons' logs are long.
	{ $(GO) test -race -tags e2e -p 1 -count 1 -timeout 45m $(if $(RUN),-run '$(RUN)') ./e2e/... || touch build/e2e.failed; } 2>&1 | tee build/e2e.log; \
	if [ -e build/e2e.failed ]; then rm build/e2e.failed; echo; echo 'What failed:'; \
		grep -aE -A3 '^ *(--- FAIL|panic|[a-z_]+_test\.go:[0-9]+:)' build/e2e.log | cut -c1-1000 | tail -60; exit 1; fi

# The four layers of proof. The first three are in make test as well, shorter.
.PHONY: model
model: ## every interleaving of a model of the protocol, and of its broken variants
	$(GO) test -count 1 -v -timeout 20m ./driver/ownership/model

.PHONY: sim
sim: ## the real code on everything in memory, with faults; SEEDS=n, SEED=first
	$(GO) test -count 1 -timeout 60m ./driver -run 'TestRandom|TestKilled|TestTaker' -pairs -seed $(or $(SEED),1) -seeds $(or $(SEEDS),300)

.PHONY: test-etcd
test-etcd: ## ownership on three real etcd members that are killed, paused, cut off, restored
	$(GO) test -race -count 1 -v -timeout 20m ./driver/ownership/robustness

.PHONY: chaos
chaos: deps plugin-teststore ## real hosts, broken at random while services write; TIME=10m, ARGS='-seed 7 -report FILE'
	$(GO) run ./e2e/chaos -backend both -time $(or $(TIME),10m) $(ARGS)

.PHONY: fuzz
fuzz: ## each fuzz test for FUZZTIME (30s)
	for dir in $$($(GO) list -f '{{.Dir}}' ./...); do \
		for name in $$(grep -hos '^func Fuzz[A-Za-z0-9_]*' $$dir/*_test.go | cut -c6-); do \
			$(GO) test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(or $(FUZZTIME),30s) $$dir || exit; \
		done; done

.PHONY: deps
deps: ## install the Debian packages that are missing
	@missing=; for p in $(PACKAGES); do \
		dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; done; \
	[ -z "$$missing" ] && exit; \
	[ $$(id -u) = 0 ] || { echo "missing Debian packages; as root: apt-get install$$missing" >&2; exit 1; }; \
	export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1; apt="timeout 900 apt-get -qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120"; \
	$$apt update && $$apt install --no-install-recommends $$missing

.PHONY: engine
engine: deps $(BIN)/.dockerd-$(DOCKERD) $(BIN)/.runc-$(RUNC) $(BIN)/.compose-$(COMPOSE) ## build Docker Engine 29, runc and Compose for the tests (minutes, once)

.PHONY: lint
lint: $(BIN)/.golangci-lint-$(GOLANGCI)

go-install = GOBIN=$(BIN) nice $(GO) install

$(BIN)/.dockerd-$(DOCKERD):
	$(go-install) github.com/moby/moby/v2/cmd/dockerd@$(DOCKERD)
	$(go-install) github.com/moby/moby/v2/cmd/docker-proxy@$(DOCKERD)
	@touch $@

$(BIN)/.runc-$(RUNC):
	$(go-install) -tags seccomp github.com/opencontainers/runc@$(RUNC)
	@touch $@

$(BIN)/.compose-$(COMPOSE):
	$(go-install) github.com/docker/compose/v5/cmd@$(COMPOSE)
	@mv $(BIN)/cmd $(BIN)/docker-compose
	@touch $@

$(BIN)/.golangci-lint-$(GOLANGCI):
	$(go-install) github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI)
	@touch $@

.PHONY: clean
clean: ## remove what was built here, and what killed tests have left behind
	-$(GO) run ./e2e/cleanup
	rm -rf build
