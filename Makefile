# make run    the demo: pods as network namespaces, policies applied live, real packets
# make test   everything: lint, types, unit, property, namespace and end-to-end tests
# Both set this machine up by themselves (system packages, .venv, build) and are quick to repeat.

SHELL := /bin/bash
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH):/usr/sbin:/sbin
# Tests at a time: they wait for packets a third of their time. PYTEST_ARGS are further options for pytest.
WORKERS ?= $(shell echo $$(( ($$(nproc 2>/dev/null || echo 2) * 3 + 1) / 2 )))

.PHONY: run test e2e setup setup-test kube-apiserver lint types bench micro sanitize wheel picture clean help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile
	@echo "make bench  whole-path benchmarks with their baselines (several minutes)"
	@echo "make e2e IMAGE=…  on the cluster that KUBECONFIG names: installs, tests with real pods, removes"
	@echo "make sanitize  packet, rule and netlink code under address and undefined-behaviour sanitizers"
	@echo "make wheel  the wheel, in dist/"
	@echo "make picture  draws docs/matrix.png anew, in a browser"

setup:
	@.ci/setup

# A browser too, which nothing but its tests should wait for.
setup-test:
	@.ci/setup test

run: setup
	@$(BIN)/podgate lab demo

test: setup-test kube-apiserver lint types
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# For the tests against a real one; built in the background, where there is Go.
kube-apiserver: setup
	@$(BIN)/python tests/cluster/kube_binaries.py --start

# IMAGE: what nodes pull. AGENT_ENV: settings, for example PODGATE_VETH_PREFIX=cali. KEEP=1 leaves all for a
# look, REMOVE=1 removes it then.
e2e:
	@command -v python3 >/dev/null || { echo "make e2e needs python3" >&2; exit 2; }
	@[ -n "$(IMAGE)" ] || { echo "make e2e: name podgate's image, as nodes pull it: IMAGE=registry.example/podgate:0.1.0" >&2; exit 2; }
	@python3 tests/e2e --image "$(IMAGE)" --kubectl "$${KUBECTL:-kubectl}" $(if $(KEEP),--keep) $(if $(REMOVE),--remove) \
		$(if $(AGENT_ENV),--agent-env $(AGENT_ENV))

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .
	@$(BIN)/cython-lint ext/dataplane/*.pyx ext/dataplane/*.pxd
	@.ci/performance-hints

types: setup
	@$(BIN)/mypy

bench: setup
	@$(BIN)/python bench/whole_path.py

micro: setup
	@$(BIN)/python bench/micro.py

# Not part of `make test`: compiling and running under the sanitizers takes minutes.
sanitize: setup
	@.ci/sanitize

wheel: setup
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

picture: setup-test
	@$(BIN)/python tests/browser/picture.py

clean:
	rm -rf build dist *.egg-info .venv dataplane/*.so ext/dataplane/*.c
