# Two commands: `make demo` shows the whole job on emulated hardware, `make test` proves it. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory --no-builtin-rules
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
COLLECTIONS := build/collections
# Molecule scenarios of `make test`: the main job first and the longest last, since a slow machine may not come to the last ones; each is
# a directory of molecule/. `microvm` is run by name: it takes as long as all the others, and nothing else may run beside it.
SCENARIO ?= default host kvcache threefs

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg
export PYTHONDONTWRITEBYTECODE := 1
export MOLECULE_COMMAND_BORDERS := false
export MOLECULE_GLOB := molecule/*/molecule.yml

## help: this list
help:
	@sed -n 's/^## //p' Makefile

## demo: CXL, vfio, SR-IOV, four microVMs and a KV-cache pool on an emulated server; ends in build/report.html
demo: lab-up
	ansible-playbook -i inventories/lab playbooks/site.yml
	@echo "== The lab host is still running: look around, then 'make lab-down'. Report: build/report.html"

## test: lint, sanity, unit tests, build, molecule scenarios, and nothing left running
test: setup
	@python .ci/run_tests.py $(SCENARIO)

## setup: system packages, Python environment and collections (does nothing when they are there)
setup: build/.packages

$(VENV)/.ready: requirements/python.txt
	@.ci/venv $(VENV)
	@touch $@

$(COLLECTIONS)/.ready: requirements/ansible.txt requirements/collections.yml .ci/unpack_collections.py $(VENV)/.ready
	@rm -rf $(COLLECTIONS)
	@python .ci/unpack_collections.py $(COLLECTIONS)
	@touch $@

# Needs root only when something is missing; where sudo wants a password: ANSIBLE_BECOME_ASK_PASS=true make setup
build/.packages: roles/lab/tasks/packages.yml .ci/programs.yml $(COLLECTIONS)/.ready
	@echo "== system packages of the lab"
	@ansible localhost -i localhost, --connection local -e ansible_python_interpreter=$(CURDIR)/$(VENV)/bin/python \
	  -e @.ci/programs.yml -m include_role -a 'name=agentfleet.metal.lab tasks_from=packages.yml'
	@touch $@

## lint: ruff, mypy, yamllint, ansible-lint, changelog fragments, generated READMEs
lint: setup
	@echo "== lint"; failed=0; \
	for linter in "ruff check --quiet ." "ruff format --quiet --check ." mypy "yamllint --strict ." \
	  "python .ci/role_readmes.py --check" "antsibull-changelog lint" "ansible-lint --offline --strict -q"; do \
	  echo "-- $$linter"; $$linter || failed=1; \
	done; exit $$failed

## unit: unit tests with plain pytest (quick; `make test` runs the same under ansible-test)
unit: setup
	@pytest -q

## contract: what is sent to other programs, held against their own descriptions
contract: setup
	@pytest -q --junitxml=build/test/contract.xml tests/contract

## sanity: ansible-test sanity; units-sandboxed: ansible-test units (both on a copy of the tree, without Docker)
sanity units-sandboxed: setup
	@.ci/ansible-test $@

## build: build the collection, install the archive elsewhere and read every module's documentation from there
build: setup
	@.ci/build

## molecule: the scenarios of `make test`, or SCENARIO=microvm; each creates its lab, converges, verifies and destroys it
molecule: setup
	@for scenario in $(SCENARIO); do molecule test -s "$$scenario"; done

## bench: all benchmarks, on the lab; results in benchmarks/results
bench: lab-up
	@benchmarks/run

## lab-up, lab-down: start and stop the lab of inventories/lab
lab-up lab-down: setup
	ansible-playbook -i inventories/lab playbooks/$(subst -,_,$@).yml

## docs: generate the roles' READMEs from their argument specs
docs: setup
	python .ci/role_readmes.py

## lock: resolve requirements/*.in anew into the lock files, for all supported Python versions
lock:
	@python3 -m venv build/lock && build/lock/bin/pip install --quiet uv
	@for name in python ansible; do \
	  build/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --upgrade \
	    --no-emit-index-url --no-header $$([ $$name = python ] || echo --no-deps) -o requirements/$$name.txt requirements/$$name.in; \
	done

## clean: stop the lab and remove what was made in this directory
clean:
	@if [ -e $(COLLECTIONS)/.ready ]; then $(MAKE) lab-down; fi
	rm -rf build $(VENV) .ansible

.PHONY: help demo test setup lint unit contract sanity units-sandboxed build molecule bench lab-up lab-down docs lock clean
