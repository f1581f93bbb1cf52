# Two commands: `make up` and `make test`. Everything is installed in .venv and nowhere else.
PYTHON ?= python3
PIP_INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: up test lint types unit bench clean

up: .venv/installed
	@.venv/bin/pipeline up $(ARGS)

test: .venv/installed-dev lint types unit

lint: .venv/installed-dev
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/lint-imports

types: .venv/installed-dev
	.venv/bin/mypy

# Three runs side by side, which wait for clocks most of the time, and of which each takes about as long: pipelines; cameras
# with nano and the benchmarks; all the rest. Then many seeds, which want both cores.
CAMERAS = $(wildcard tests/stages/test_media*.py)
NANO = tests/end_to_end/test_nano.py
CLUSTER = tests/end_to_end/test_cluster.py
APART = tests/end_to_end tests/benchmarks tests/simulation
REST = $(filter-out $(APART),$(patsubst %/,%,$(wildcard tests/*/)))
PYTEST = .venv/bin/python -m pytest $(PYTEST_ARGS)

unit: .venv/installed-dev
	@$(PYTEST) tests/end_to_end $(NANO:%=--ignore=%) $(CLUSTER:%=--ignore=%) > .venv/pipelines.log 2>&1 & pipelines=$$!; \
	$(PYTEST) $(CAMERAS) $(NANO) tests/benchmarks > .venv/cameras.log 2>&1 & cameras=$$!; \
	trap 'kill $$pipelines $$cameras 2>/dev/null' INT TERM; \
	$(PYTEST) $(REST) $(CLUSTER) $(CAMERAS:%=--ignore=%); rest=$$?; \
	wait $$pipelines; failed=$$((rest + $$?)); wait $$cameras; failed=$$((failed + $$?)); \
	$(PYTEST) tests/simulation; failed=$$((failed + $$?)); \
	cat .venv/pipelines.log .venv/cameras.log; exit $$failed

bench: .venv/installed-dev
	.venv/bin/pipeline bench $(ARGS)

# torch first, on its own: pip then keeps this build for everything that asks for torch.
.venv/torch: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: Python 3.11 or newer is needed; name one: make up PYTHON=python3.11" >&2; exit 1; }
	@.venv/bin/python -m pip --version >/dev/null 2>&1 \
	  || { echo "make: creating .venv"; $(PYTHON) -m venv --clear .venv; } \
	  || { echo "make: no venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "make: installing (the first time takes a few minutes)"
	@$(PIP_INSTALL) -c constraints.txt torch
	@touch $@

.venv/installed: .venv/torch
	@$(PIP_INSTALL) -c constraints.txt -e .
	@touch $@

.venv/installed-dev: .venv/torch
	@$(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@touch .venv/installed $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
