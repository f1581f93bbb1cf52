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

unit: .venv/installed-dev
	.venv/bin/python -m pytest $(PYTEST_ARGS)

bench: .venv/installed-dev
	.venv/bin/pipeline bench $(ARGS)

# torch first, on its own: pip then keeps this build for everything that asks for torch.
.venv/installed: pyproject.toml constraints.txt
	@test -x .venv/bin/python || { echo "make: creating .venv"; $(PYTHON) -m venv .venv; }
	@echo "make: installing (the first time takes a few minutes)"
	@$(PIP_INSTALL) -c constraints.txt torch
	@$(PIP_INSTALL) -c constraints.txt -e .
	@touch $@

.venv/installed-dev: .venv/installed
	@$(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
