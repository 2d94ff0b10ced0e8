# Every target sets up its own virtual environment first. PYTHON=python3.13 uses another Python, with the newest packages that
# pyproject.toml admits; the pins of constraints.txt are for Python 3.11.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := $(if $(filter 3.11,$(VERSION)),.venv,.venv-$(VERSION))
CONSTRAINTS := $(if $(filter 3.11,$(VERSION)),-c constraints.txt)
BIN := $(VENV)/bin
RUN := runs/demo

.PHONY: help demo test clients test-gpu test-gpu-compile lint docs setup shipped

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "PYTHON=python3.13 uses another Python. This one is $(or $(PYTHON),missing)$(if $(VERSION), ($(VERSION)))."

demo: setup  ## train, export, measure and serve: about nine minutes on 2 cores, no GPU needed
	$(BIN)/python train/supernet.py configs/digits_resnet.py --workdir $(RUN)
	$(BIN)/python serve/measure.py $(RUN)/export
	$(BIN)/python serve/replay.py $(RUN)/export --json $(RUN)/results.json --plot $(RUN)/replay.png

test: setup  ## run the whole test suite
	$(BIN)/python -m pytest

clients: .venv-clients/.ready  ## make the environment of the tests with tritonclient and perf_analyzer, whose pins differ from ours

test-gpu: .venv-gpu/.ready  ## run the tests that need a GPU, and those of test-gpu-compile; fails without a GPU
	@.venv-gpu/bin/python -c 'import jax; print(jax.devices("gpu"))' || { \
	  echo "jax finds no GPU here, so all tests would be skipped; check nvidia-smi, and see docs/serving.md"; exit 1; }
	.venv-gpu/bin/python -m pytest -m gpu
	.venv-gpu/bin/python -m pytest -n0 -s -m gpu_aot tests/programs/test_gpu_compile.py

test-gpu-compile: .venv-gpu-aot/.ready  ## compile for an H100 and an A100 without a GPU, and check the kernel counts (downloads 4.5 GB)
	.venv-gpu-aot/bin/python -m pytest -n0 -s -m gpu_aot tests/programs/test_gpu_compile.py

lint: setup  ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

shipped: setup  ## train and export again what ss.load("digits") loads
	$(BIN)/superserve train digits_resnet --workdir runs/digits --search.served 6 --search.tolerance None
	$(BIN)/superserve export runs/digits --out superserve_jax/shipped/digits

docs: setup  ## build docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

.venv-clients/.ready: tests/data/clients.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet -r $<
	touch $@

.venv-gpu/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet $(CONSTRAINTS) -e '.[cuda13,dev]'
	touch $@

.venv-gpu-aot/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-gpu-aot
	.venv-gpu-aot/bin/python -m pip install --quiet $(CONSTRAINTS) -e '.[gpu-aot]'
	touch $@

setup: $(VENV)/.ready  ## make the virtual environment

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "superserve-jax needs Python 3.11 or newer, and '$(PYTHON)' is $(or $(VERSION),missing); try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[dev]'
	touch $@
