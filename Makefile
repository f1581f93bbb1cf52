# Two commands: `make up` and `make test`. Everything is installed in .venv and nowhere else.
PYTHON ?= python3
# Compiled is what is used, once, before five processes would do it at the same time: a third of all that is installed.
PIP_INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile
COMPILE_WHAT_IS_USED = .venv/bin/python -c 'import av, deploy.actor.actor, deploy.cli.app, deploy.control.coordinator, deploy.run.up, \
  model_shards.checkpoint, stages.llm, stages.vocoder, uvicorn.protocols.http.auto'

.PHONY: up test lint types unit bench clean

up: .venv/installed
	@.venv/bin/pipeline up $(ARGS)

test: .venv/installed-dev lint
	@$(MAKE) --no-print-directory unit TYPES=types

lint: .venv/installed-dev
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/lint-imports

types: .venv/installed-dev
	.venv/bin/mypy

# Three runs side by side, each of about the same length, in `make test` one of them behind the check of the types. What
# hears the clock comes first in its run, and what computes most last, so that they meet as little as may be; the run
# that hears no clock takes what the others leave, and brings its pipelines behind that. Then many seeds, which want both cores.
PYTEST = .venv/bin/python -m pytest $(PYTEST_ARGS)
E2E = tests/end_to_end/test_
WITH_CAMERAS = $(E2E)dashboards.py $(E2E)nano.py
WITH_REST = $(E2E)detached.py $(E2E)cluster.py $(E2E)ends.py
HEARS_CLOCK = $(E2E)tail.py $(E2E)up.py
PIPELINES = $(HEARS_CLOCK) $(filter-out $(HEARS_CLOCK) $(WITH_CAMERAS) $(WITH_REST),$(wildcard $(E2E)*.py))
DECODERS = $(wildcard tests/stages/test_media*.py)
CAMERAS = $(DECODERS) $(WITH_CAMERAS) tests/benchmarks
APART = tests/end_to_end tests/benchmarks tests/simulation
REST = $(filter-out $(APART),$(patsubst %/,%,$(wildcard tests/*/))) $(DECODERS:%=--ignore=%)

unit: .venv/installed-dev
	@$(PYTEST) $(PIPELINES) > .venv/pipelines.log 2>&1 & pipelines=$$!; \
	{ $(if $(TYPES),$(MAKE) $(TYPES) &&) $(PYTEST) $(CAMERAS); } > .venv/cameras.log 2>&1 & cameras=$$!; \
	trap 'kill $$pipelines $$cameras 2>/dev/null' INT TERM; \
	nice $(PYTEST) $(REST); rest=$$?; \
	$(PYTEST) $(WITH_REST); rest=$$((rest + $$?)); \
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
	@$(COMPILE_WHAT_IS_USED)
	@touch $@

.venv/installed-dev: .venv/torch tests/outside/pyproject.toml
	@$(PIP_INSTALL) -c constraints.txt -e '.[dev]' -e tests/outside
	@$(COMPILE_WHAT_IS_USED)
	@touch .venv/installed $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
