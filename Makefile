# make quickstart: set up and train a small GPT on real text.   make test: set up and run the tests.
# make PYTHON=python3.13 test: the same with another Python, in an environment of its own.
# make TORCH=2.9.0 test: the same with another torch, in an environment of its own.
PYTHON ?= python3
TORCH ?=
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))$(if $(TORCH),-torch-$(TORCH))
BIN := $(VENV)/bin
PLUGINS := $(sort $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml)))
# Plugins that bring heavy packages which the quickstart does not use; `make setup` installs them.
EXTRA := plugins/tensorboard plugins/wandb
JOBS ?= 2
# Generated from the code: two pages, and the tables in the README of every plugin.
READMES := $(filter-out plugins/authoring/README.md,$(PLUGINS:%=%/README.md))
REFERENCE := --settings docs/settings.md --hooks docs/hooks.md $(READMES:%=--readme %)

.PHONY: setup quickstart test test-all-pythons test-torch-range test-gpu test-faults test-ui screenshots browser lint bench \
	bench-gpu dist reference clean

# --no-compile: Python compiles the modules that a command imports, which are few, when it imports them.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	-c $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
STATED := constraints.txt pyproject.toml $(PLUGINS:%=%/pyproject.toml)

setup: $(VENV)/.ready

# What a run needs. One pip call for everything, without isolated builds, takes a minute or two; a
# call for each distribution takes ten.
$(VENV)/.ready-to-run: $(STATED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fundamentallm needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up $(VENV): torch, MLflow and the plugins, some 400 MB of packages without torch, in one"
	@echo "to three minutes. torch's ordinary build for Linux brings 2.5 GB of CUDA libraries. For the CPU"
	@echo "build (200 MB) make the environment first, and install torch from PyTorch's index of CPU builds:"
	@echo "  $(PYTHON) -m venv $(VENV); $(BIN)/pip install torch --index-url <index>   (see README.md)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $(VENV)/constraints.txt)
	$(PIP) hatchling editables
	$(PIP) --no-build-isolation -e . $(patsubst %,-e ./%,$(filter-out $(EXTRA),$(PLUGINS)))
	@touch $@

# What tests and checks need in addition.
$(VENV)/.ready: $(VENV)/.ready-to-run $(STATED)
	$(PIP) --no-build-isolation -e '.[dev]' $(EXTRA:%=-e ./%)
	@touch $@

quickstart: $(VENV)/.ready-to-run
	$(BIN)/fundamentallm train settings/quickstart.toml

test: setup
	@echo "Left out here: slow fault and outage tests (make test-faults), tests in a browser (make test-ui),"
	@echo "building and installing the distributions (make dist), measurements (make bench); tests marked"
	@echo "cuda are skipped where there is no NVIDIA GPU."
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow and not ui"

# The oldest and the newest torch of the range in pyproject.toml: 40 minutes, and 6 GB on the disk for
# each, since only PyTorch's own index has builds without CUDA.
TORCHES ?= 2.9.0 2.15.0
test-torch-range:
	@for torch in $(TORCHES); do $(MAKE) test TORCH=$$torch || exit 1; done

# Every Python that pyproject.toml names and this machine has, from pyenv or on the PATH; see
# .github/workflows/test.yml. make PYTHONS="/opt/a/python3.12 python3.13" test-all-pythons: these.
PYTHONS ?= $(or $(wildcard $(HOME)/.pyenv/versions/3.1[123].*/bin/python3.1[123]),python3.11 python3.12 python3.13)
test-all-pythons:
	@for python in $(PYTHONS); do \
		$$python -c '' 2>/dev/null || { echo "no $$python here: skipped"; continue; }; \
		$(MAKE) test PYTHON=$$python || exit 1; done

# Every test marked cuda; on a machine without a network, environment or plugins: tests/gpu/run.sh.
GPU_TESTS = $(shell grep -rl --include='test_*.py' 'pytest\.mark\.cuda' tests plugins)
test-gpu: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cuda $(GPU_TESTS)

# 25 minutes: every kill, fault and outage.
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
	$(PIP) --no-build-isolation -e '.[ui]'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fundamentallm $(wildcard plugins/*/fundamentallm_*)
	$(BIN)/lint-imports
	$(BIN)/fundamentallm reference --check $(REFERENCE)

# Wheels and sdists of all distributions, checked, and installed alone into an empty environment.
dist: setup
	$(PIP) --no-build-isolation -e '.[dist]'
	$(BIN)/python tests/dist/check.py dist

bench: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/run.py

# GPT-2 on an NVIDIA GPU against a handwritten loop, nanoGPT's way and the roofline; without a GPU it says so.
bench-gpu: setup
	$(BIN)/python tests/gpu/bench.py --out build/gpu

reference: setup
	$(BIN)/fundamentallm reference $(REFERENCE)

clean:
	rm -rf .venv .venv-* dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
