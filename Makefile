# make demo   train, export, measure and serve: six to ten minutes on 2 cores, no GPU needed
# make test   the whole test suite
# make lint   formatting, lint and types
#
# Each sets up its own virtual environment first. PYTHON=python3.13 uses another Python, with the newest packages that
# pyproject.toml admits; the pins of constraints.txt are those of Python 3.11.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := $(if $(filter 3.11,$(VERSION)),.venv,.venv-$(VERSION))
CONSTRAINTS := $(if $(filter 3.11,$(VERSION)),-c constraints.txt)
BIN := $(VENV)/bin
RUN := runs/demo

.PHONY: demo test lint setup

demo: setup
	$(BIN)/python train/supernet.py configs/digits_resnet.py --workdir $(RUN)
	$(BIN)/python serve/measure.py $(RUN)/export
	$(BIN)/python serve/replay.py $(RUN)/export --json $(RUN)/results.json --plot $(RUN)/replay.png

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[dev]'
	touch $@
