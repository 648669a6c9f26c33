# The two commands of the README, what a developer runs, and what CI calls. `make help` lists them.
# .venv holds the Python that PYTHON names, .venv-newest the newest Python of this machine with the newest JAX.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NEWEST := .venv-newest
RUN := runs/quickstart
# Exact versions that CI passed with, where there are some for this Python; a plain `make install` takes the newest.
constraints = $(addprefix --constraint=,$(wildcard constraints/python$(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt))
print_versions = import sys; from importlib.metadata import version; \
  print("Python", sys.version.split()[0], *(f"{name} {version(name)}" for name in "jax jaxlib flax optax orbax-checkpoint grain numpy".split()), sep=", ")
# Large pages for the heap, as the console script asks for (clipjax/cli/main.py): training on CPUs is twice as fast.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help install install-test quickstart test test-fast test-all test-newest lint format constraints clean

help:  # this list
	@sed -n 's/^\([a-z-]*\):.*  # /\1: /p' Makefile

install: $(VENV)/.installed  # clipjax into .venv
install-test: $(VENV)/.installed-test  # clipjax and what its tests need into .venv

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "clipjax needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: setup.py $(wildcard constraints/*.txt) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(call constraints,$(BIN)/python) --editable '.[test]'
	touch $@ $(VENV)/.installed

$(NEWEST)/.installed: setup.py
	.ci/newest-python
	$$(.ci/newest-python) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST)/bin/python -m pip install --quiet $(addprefix --constraint=,$(NEWEST_CONSTRAINTS)) --editable '.[test]'
	touch $@

quickstart: install  # data, training and evaluation of a small model, in minutes
	$(BIN)/clipjax data scenes --tfds_dir=data
	$(BIN)/clipjax data tokenizer --source=tfds:scenes/train --tfds_dir=data --vocab_size=304 --output=data/scenes.model
	$(BIN)/clipjax train --config=configs/quickstart.py --workdir=$(RUN)
	$(BIN)/clipjax eval --checkpoint=$(RUN) --output=$(RUN)/results.json

test: install-test  # the tests
	$(BIN)/python -m pytest -m "not slow"

test-fast: install-test  # those that start no process and compile for no other machine
	$(BIN)/python -m pytest -m "not slow and not process and not compile_ahead"

test-all: install-test  # the slow ones too
	$(BIN)/python -m pytest

# NEWEST_PYTHON=python3.12 takes that one; NEWEST_CONSTRAINTS=constraints/newest.txt takes the versions written there.
test-newest: $(NEWEST)/.installed  # a part of the tests with the newest Python and JAX
	@$(NEWEST)/bin/python -c '$(print_versions)'
	$(NEWEST)/bin/python -m pytest -m newest

lint: install-test  # style, types, imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: install-test  # mend the style where ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  # remove environments, data and runs
	rm -rf $(VENV) $(NEWEST) data runs build *.egg-info
