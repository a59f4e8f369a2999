# Every target sets up what it needs in .venv and is quick the second time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# ADAMAX_REQUIRE_FRAMEWORKS=1 installs the frameworks that tests compare with, and makes a
# missing one a failure. Otherwise tests that need a missing one are skipped.
TEST_GROUPS := test examples $(if $(filter 1,$(ADAMAX_REQUIRE_FRAMEWORKS)),frameworks)
installed = $(foreach group,$(1),$(VENV)/.installed-$(group))

.PHONY: demo test lint bench constraints clean

demo: $(call installed,examples)
	$(BIN)/python examples/word_vectors.py

test: $(call installed,$(TEST_GROUPS))
	$(BIN)/python -m pytest -n auto --dist loadgroup

lint: $(call installed,lint test examples frameworks)
	PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files --show-diff-on-failure

bench: $(call installed,frameworks examples)
	$(BIN)/python -m benchmarks

# Pin the versions that development and CI use.
constraints:
	rm -rf build/constraints && $(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install --quiet --upgrade pip
	build/constraints/bin/python -m pip install --quiet -e ".[numpy]" \
		--group test --group lint --group examples --group frameworks
	build/constraints/bin/python -m pip list --format freeze --exclude-editable \
		| sed 's/+cpu$$//' > constraints.txt

clean:
	rm -rf $(VENV) build dist out

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "adamax needs Python 3.11 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt pip

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt -e ".[numpy]" --group $*
	touch $@
