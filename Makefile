# Every target sets up what it needs in .venv and is quick the second time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
NATIVE := CMakeLists.txt $(wildcard src/adamax/_native/*pp)

# ADAMAX_REQUIRE_FRAMEWORKS=1 installs the frameworks that tests compare with, and makes a
# missing one a failure. Otherwise tests that need a missing one are skipped.
TEST_GROUPS := test examples $(if $(filter 1,$(ADAMAX_REQUIRE_FRAMEWORKS)),frameworks)
installed = $(VENV)/.built $(foreach group,$(1),$(VENV)/.installed-$(group))

.PHONY: demo test lint bench sanitize stress dist constraints clean

demo: $(call installed,examples)
	$(BIN)/python examples/word_vectors.py

test: $(call installed,$(TEST_GROUPS))
	$(BIN)/python -m pytest -n auto --dist loadgroup

lint: $(call installed,lint test examples frameworks)
	PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files --show-diff-on-failure

bench: $(call installed,frameworks examples)
	$(BIN)/python -m benchmarks

# The tests of the verbs with the native core under AddressSanitizer and
# UndefinedBehaviorSanitizer, then its threads under ThreadSanitizer.
sanitize: $(call installed,test)
	$(BIN)/python tests/native/sanitize.py

# What held once goes on holding, for five minutes: MINUTES=60 for longer.
MINUTES ?= 5
stress: $(call installed,test examples)
	$(BIN)/python tests/system/stress.py --minutes $(MINUTES)

# What would be uploaded, tested as installed, away from the tree and without a compiler.
dist: $(call installed,test examples dist)
	$(BIN)/python tests/native/dist.py

# Pin the versions that development and CI use.
constraints:
	rm -rf build/constraints && $(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install --quiet --upgrade pip
	build/constraints/bin/python -m pip install --quiet -e ".[numpy]" \
		--group test --group lint --group examples --group dist --group frameworks
	build/constraints/bin/python -m pip install --quiet scikit-build-core cmake ninja
	build/constraints/bin/python -m pip list --format freeze --exclude-editable \
		| sed 's/+cpu$$//' > constraints.txt

clean:
	rm -rf $(VENV) build dist out

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "adamax needs Python 3.11 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt pip

$(VENV)/.built: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	$(PIP) install --constraint constraints.txt --build-constraint constraints.txt -e ".[numpy]"
	@$(BIN)/python -c 'import adamax._native.verbs' 2>/dev/null || echo "There is no C++ compiler: \
	adamax was installed without its native core, and computes in NumPy, many times slower."
	touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/.built
	$(PIP) install --constraint constraints.txt --group $*
	touch $@
