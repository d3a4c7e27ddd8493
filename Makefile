# The commands of the project; `make` alone prints them.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# rewritten by every installation: what is older than pyproject.toml is out of date
STAMP := $(VENV)/.difflut_lab

.PHONY: help install train test lint format bench gpu-check clean

help: ## print this list
	@echo "Usage: make TARGET [ARGS=\"...\"] [PYTHON=python3.12] [VENV=.venv]"
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

install: $(STAMP) ## make .venv and install the package with its dependencies; the other targets do it where needed

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "difflut_lab needs Python 3.11 or newer; $(PYTHON) is" \
			"$$($(PYTHON) --version 2>/dev/null || echo "not installed"). Another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV). The first time, PyTorch and what it needs for GPUs are downloaded:" \
		"several GB and some minutes. The largest files are named as they come:"
	@$(PYTHON) -m venv "$(VENV)"
	@"$(VENV)/bin/python" -m pip install --disable-pip-version-check --progress-bar off --editable '.[dev]' \
		| sed -unE 's/^ *(Downloading|Using cached) ([^ ]*\/)?([^ \/-]+)-[0-9][^ ]*\.whl \(([0-9.]{5,} MB|[0-9.]+ GB)\)$$/  \3 (\4)/p'
	@touch $@
	@echo "Installed. To work in the environment: source $(VENV)/bin/activate"

train: $(STAMP) ## train a network on scikit-learn's digits; overrides: make train ARGS="node=dwn data=mnist"
	@"$(VENV)/bin/python" train.py layer=random_routing $(ARGS)

test: $(STAMP) ## run the tests but those marked slow; for those: make test ARGS="-m slow"
	@"$(VENV)/bin/python" -m pytest $(ARGS)

lint: $(STAMP) ## check style, formatting and types
	@status=0; "$(VENV)/bin/ruff" check || status=1; "$(VENV)/bin/ruff" format --check || status=1; \
		"$(VENV)/bin/mypy" || status=1; exit $$status

format: $(STAMP) ## format the code and correct what can be corrected
	@"$(VENV)/bin/ruff" check --fix
	@"$(VENV)/bin/ruff" format

bench: $(STAMP) ## measure ops, layers and training steps in 10 minutes; less: make bench ARGS="--quick"
	@"$(VENV)/bin/python" scripts/benchmark.py $(ARGS)

gpu-check: $(STAMP) ## test the Triton kernels on this machine's GPU, then measure them; less: make gpu-check ARGS=--quick
	@"$(VENV)/bin/python" scripts/gpu_check.py $(ARGS)

clean: ## remove caches and built packages; outputs/ and .venv stay
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
