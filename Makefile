# Two commands: `make demo` runs everything on bundled digits, `make test` the fast tests.
# Both make .venv when it is missing or its pins changed, and need Python 3.11 or later and make.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# One process per core; the tests of one file stay together, as they share what is expensive to prepare
PARALLEL := -n auto --maxprocesses 8 --dist loadfile

.PHONY: demo test lint slow install

demo: install
	dvc repro
	@echo
	@cat outputs/$$(sed -n 's/^name: //p' params.yaml)/evaluation/table.txt

test: install
	pytest $(PARALLEL)

# Style and types; the settings are in pyproject.toml
lint: install
	ruff check .
	basedpyright --level error

slow: install
	pytest -m 'slow and not campaign' $(PARALLEL)

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@
