# The one entry to build, test and install Fermata. `make` alone lists the targets.
#
# `build` and the tests use --workspace --all-targets. `programs` builds what `make demo` needs and nothing else, with the
# same features of every package: with others cargo would compile them a second time.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
# rustup's usual home, for shells that have not read its profile yet.
export PATH := $(PATH):$(HOME)/.cargo/bin

CARGO ?= cargo
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
CARGO_DENY_VERSION := 0.20.2

# `make install`: PROFILE=dev installs the debug build.
DESTDIR ?=
PREFIX ?= /usr
PROFILE ?= release
BUILT := $(TARGET_DIR)/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))
UNITDIR ?= $(PREFIX)/lib/systemd/system
USERUNITDIR ?= $(PREFIX)/lib/systemd/user
SYSUSERSDIR ?= $(PREFIX)/lib/sysusers.d
PLUGINDIR ?= $(PREFIX)/lib/fermata/plugins
DOCDIR ?= $(PREFIX)/share/doc/fermata
BINARIES := fermatad fermatactl fermata-shim fermata-plugin-host
PLUGINS := exec

.DEFAULT_GOAL := help
.PHONY: help bootstrap programs build release test test-stress test-agents test-systemd test-machine demo bench bench-checkpoints bench-scale lint deny install clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

bootstrap: ## check for a C compiler, git and the pinned Rust toolchain
	@scripts/bootstrap

PACKAGES := fermata-daemon fermata-shim fermata-ctl fermata-plugin-exec

programs: bootstrap ## build the programs and the exec plugin for development
	$(CARGO) build $(addprefix -p ,$(PACKAGES)) -p fermata-failpoint --features fermata-failpoint/enabled

build: bootstrap ## build everything for development, plugins and tests included
	$(CARGO) build --workspace --all-targets

# The client needs nothing of the dynamic linker but time, a third of what it takes to start: where the static C library
# is there (libc6-dev has it, elsewhere it is a package of its own), the client is linked with that.
STATIC_CLIENT := $(if $(findstring /,$(shell $(or $(CC),cc) -print-file-name=libc.a)),yes)

# Without the tests, which would turn failpoints on.
release: bootstrap ## build everything optimised
	$(CARGO) build --release $(addprefix -p ,$(if $(STATIC_CLIENT),$(filter-out fermata-ctl,$(PACKAGES)),$(PACKAGES)))
	$(if $(STATIC_CLIENT),$(CARGO) rustc --release -p fermata-ctl --bin fermatactl -- -C target-feature=+crt-static)
	@for program in $(BINARIES); do \
	    ! grep -q FERMATA_FAILPOINT $(TARGET_DIR)/release/$$program || \
	        { echo "release: $$program has failpoints: a package of this build enables them" >&2; exit 1; }; \
	done

test: build ## run all tests
	CARGO="$(CARGO)" scripts/test

test-stress: build ## run all tests three times on busy processors, with random seeds
	CARGO="$(CARGO)" scripts/test-stress

test-agents: build ## run a real agent (the Codex CLI) against a scripted model server
	CARGO="$(CARGO)" scripts/test-agents

test-systemd: build ## boot a real systemd in a container and run the system service in it
	scripts/test-systemd

test-machine: build ## boot a machine with every controller on cgroup v2 and test limits in it
	scripts/test-machine

demo: programs ## see a pause, a crash, a restore and a resume in a throw-away daemon
	scripts/demo

bench: release ## compare with pueue and supervisord (where installed), with plain files, and checkpoints with git
	CARGO="$(CARGO)" scripts/bench
	$(MAKE) bench-checkpoints

bench-checkpoints: release ## measure checkpoints and restores of 78,000 files beside git, and a pause with 10,000 context items
	scripts/bench-checkpoints --get-tree
	scripts/bench-pause

bench-scale: release ## measure a thousand agents: memory, idle work, ps, a pause, a restart
	scripts/bench-scale

lint: bootstrap ## fmt, clippy and rustdoc, warnings denied
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --document-private-items

deny: bootstrap ## check licences, sources and banned dependencies
	CARGO="$(CARGO)" scripts/deny $(CARGO_DENY_VERSION)

install: ## install under DESTDIR and PREFIX what `make release` has built
	@test -x $(BUILT)/fermatad || { echo "install: nothing is built in $(BUILT); run 'make release' first" >&2; exit 1; }
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(UNITDIR) $(DESTDIR)$(USERUNITDIR)
	install -d $(DESTDIR)$(SYSUSERSDIR) $(DESTDIR)$(PLUGINDIR) $(DESTDIR)$(DOCDIR)
	install -m 0755 $(BINARIES:%=$(BUILT)/%) $(DESTDIR)$(PREFIX)/bin
	install -m 0644 $(PLUGINS:%=$(BUILT)/libfermata_%.so) $(DESTDIR)$(PLUGINDIR)
	for unit in fermatad.service fermatad.socket; do \
	    sed 's|/usr/bin/|$(PREFIX)/bin/|' systemd/$$unit > $(DESTDIR)$(UNITDIR)/$$unit; \
	    sed 's|/usr/bin/|$(PREFIX)/bin/|' systemd/user/$$unit > $(DESTDIR)$(USERUNITDIR)/$$unit; \
	    chmod 0644 $(DESTDIR)$(UNITDIR)/$$unit $(DESTDIR)$(USERUNITDIR)/$$unit; \
	done
	install -m 0644 systemd/fermata.sysusers $(DESTDIR)$(SYSUSERSDIR)/fermata.conf
	install -m 0644 LICENSE LICENSE-APACHE LICENSE-MIT $(wildcard README.md CHANGELOG.md docs/fermata-toml.md) $(DESTDIR)$(DOCDIR)
	install -m 0644 -D -t $(DESTDIR)$(DOCDIR)/drop-ins systemd/drop-ins/fermatad.service.d/*.conf

clean: ## remove everything that was built or downloaded
	rm -rf $(TARGET_DIR) .tools
