# make quickstart: set up and train a small GPT on real text.   make test: set up and run the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(sort $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml)))
JOBS ?= 2
# What is generated from the code: two pages, and tables in the README of everything that is a plugin.
READMES := $(filter-out plugins/authoring/README.md,$(PLUGINS:%=%/README.md))
REFERENCE := --settings docs/settings.md --hooks docs/hooks.md $(READMES:%=--readme %)

.PHONY: setup quickstart test test-faults test-ui screenshots browser lint bench reference clean

setup: $(VENV)/.ready

# One pip call for everything, without isolated builds: a minute where twenty calls take ten.
$(VENV)/.ready: constraints.txt pyproject.toml $(PLUGINS:%=%/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fundamentallm needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-build-isolation -e '.[dev]' $(PLUGINS:%=-e ./%)
	@touch $@

quickstart: setup
	$(BIN)/fundamentallm train settings/quickstart.toml

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow and not ui"

# Minutes where `make test` takes seconds: every kill, fault and outage there is.
test-faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m slow

# MLflow's pages in a real browser: Debian's Chromium, with the driver of the same version.
test-ui: browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ui tests/ui

# The same, and keeps the pictures of the pages in docs/images.
screenshots: browser
	SCREENSHOTS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ui tests/ui

BROWSER := chromium chromium-driver fonts-liberation
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
browser: setup
	@{ command -v chromium && command -v chromedriver; } >/dev/null || { \
		command -v apt-get >/dev/null && $(SUDO) apt-get update -qq && \
		$(SUDO) apt-get install -y -qq --no-install-recommends $(BROWSER); } || { \
		echo "these tests need the programs chromium and chromedriver, of one version; where Debian's"; \
		echo "packages ($(BROWSER)) cannot be had, install them and try again"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-build-isolation -e '.[ui]'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fundamentallm $(wildcard plugins/*/fundamentallm_*)
	$(BIN)/lint-imports
	$(BIN)/fundamentallm reference --check $(REFERENCE)

bench: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/run.py

reference: setup
	$(BIN)/fundamentallm reference $(REFERENCE)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
