# The two commands of the README, and what CI calls. Everything is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
# Large pages for the heap, as the console script asks for (clipjax/cli.py): training on CPUs is twice as fast.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: install install-test quickstart test test-all lint clean

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "clipjax needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.installed

quickstart: install
	$(BIN)/clipjax data scenes --tfds_dir=data
	$(BIN)/clipjax data tokenizer --source=tfds:scenes/train --tfds_dir=data --vocab_size=304 --output=data/scenes.model
	$(BIN)/clipjax train --config=configs/quickstart.py --workdir=$(RUN)
	$(BIN)/clipjax eval --checkpoint=$(RUN) --output=$(RUN)/results.json

test: install-test
	$(BIN)/python -m pytest -m "not slow"

test-all: install-test
	$(BIN)/python -m pytest

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) data runs build *.egg-info
