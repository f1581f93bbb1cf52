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

# Two runs side by side, of about the same length: one waits for cameras and clocks most of the time, the other computes.
REAL_TIME = tests/end_to_end tests/benchmarks
MOVED = tests/end_to_end/test_nano.py
COMPUTING = $(filter-out $(REAL_TIME),$(patsubst %/,%,$(wildcard tests/*/))) $(MOVED)

unit: .venv/installed-dev
	@.venv/bin/python -m pytest $(REAL_TIME) $(MOVED:%=--ignore=%) $(PYTEST_ARGS) > .venv/end_to_end.log 2>&1 & real_time=$$!; \
	trap 'kill $$real_time 2>/dev/null' INT TERM; \
	.venv/bin/python -m pytest $(COMPUTING) $(PYTEST_ARGS); computing=$$?; \
	wait $$real_time; waiting=$$?; cat .venv/end_to_end.log; exit $$((computing + waiting))

bench: .venv/installed-dev
	.venv/bin/pipeline bench $(ARGS)

# torch first, on its own: pip then keeps this build for everything that asks for torch.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: Python 3.11 or newer is needed; name one: make up PYTHON=python3.11" >&2; exit 1; }
	@.venv/bin/python -m pip --version >/dev/null 2>&1 \
	  || { echo "make: creating .venv"; $(PYTHON) -m venv --clear .venv; } \
	  || { echo "make: no venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "make: installing (the first time takes a few minutes)"
	@$(PIP_INSTALL) -c constraints.txt torch
	@$(PIP_INSTALL) -c constraints.txt -e .
	@touch $@

.venv/installed-dev: .venv/installed
	@$(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
