# The two commands of the README, what a developer runs, and what CI calls. `make help` lists them.
# .venv holds the Python that PYTHON names, .venv-newest the newest Python of this machine with the newest JAX.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NEWEST := .venv-newest
RUN := runs/quickstart
# The exact versions that CI passed with, if there are some for this Python; a .lock beside them has the hashes, and then
# they are checked (.ci/install). `make CONSTRAINTS= ...` takes the newest of everything, unchecked.
CONSTRAINTS ?= $(wildcard constraints/python$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt)
# The newest end takes the newest; `make NEWEST_CONSTRAINTS=constraints/newest.txt ...` takes what CI does.
NEWEST_CONSTRAINTS ?=
# Processes that share the tests, a file each at a time; compiling keeps one core busy. `make WORKERS=0 test`: one process.
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
print_versions = import sys; from importlib.metadata import version; \
  print("Python", sys.version.split()[0], *(f"{name} {version(name)}" for name in "jax jaxlib flax optax orbax-checkpoint grain numpy".split()), sep=", ")
# Large pages for the heap, as the console script asks for (clipjax/cli/main.py): training on CPUs is twice as fast.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help install install-test install-newest install-plan quickstart test test-fast test-all test-newest chaos lint format constraints locks audit clean

help:  # this list
	@sed -n 's/^\([a-z-]*\):.*  # /\1: /p' Makefile

install: $(VENV)/.installed  # clipjax into .venv
install-test: $(VENV)/.installed-test  # clipjax and what its tests need into .venv
install-newest: $(NEWEST)/.installed  # the same into .venv-newest, with the newest Python and JAX

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "clipjax needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py | $(VENV)/bin/python
	.ci/install $(BIN)/python "" ""
	touch $@

$(VENV)/.installed-test: setup.py $(CONSTRAINTS) $(wildcard $(CONSTRAINTS:.txt=.lock)) | $(VENV)/bin/python
	.ci/install $(BIN)/python "$(CONSTRAINTS)" test
	touch $@ $(VENV)/.installed

$(NEWEST)/.installed: setup.py $(NEWEST_CONSTRAINTS) $(wildcard $(NEWEST_CONSTRAINTS:.txt=.lock))
	.ci/newest-python
	$$(.ci/newest-python) -m venv --clear $(NEWEST)
	.ci/install $(NEWEST)/bin/python "$(NEWEST_CONSTRAINTS)" test
	touch $@

quickstart: install  # data, training and evaluation of a small model, in minutes
	$(BIN)/clipjax data scenes --tfds_dir=data
	$(BIN)/clipjax data tokenizer --source=tfds:scenes/train --tfds_dir=data --vocab_size=304 --output=data/scenes.model
	$(BIN)/clipjax train --config=configs/quickstart.py --workdir=$(RUN)
	$(BIN)/clipjax eval --checkpoint=$(RUN) --output=$(RUN)/results.json

test: install-test  # the tests
	$(BIN)/python $(PYTEST) -m "not slow"

test-fast: install-test  # those that start no process, compile for no other machine and not for seconds
	$(BIN)/python $(PYTEST) -m "not slow and not process and not compile_ahead and not heavy"

test-all: install-test  # the slow ones too
	$(BIN)/python $(PYTEST)

# `make NEWEST_PYTHON=python3.12 test-newest` takes that Python, once .venv-newest is gone.
test-newest: install-newest  # a part of the tests with the newest Python and JAX
	@$(NEWEST)/bin/python -c '$(print_versions)'
	$(NEWEST)/bin/python $(PYTEST) -m "newest and not heavy and not slow"

chaos: install-test  # every fault many times, hours in all; `make chaos PART=2/5` does a part, and goes on where it was
	$(BIN)/python -m tests.faults.chaos --part=$(or $(PART),1/1) $(if $(AGAIN),--again)

lint: install-test  # style, types, imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# With the TPU compiler the golden plans are compared. It is not in the extra "test": where it is installed and no TPU
# is, JAX complains at every start.
install-plan: install-test  # the TPU compiler into .venv
	.ci/install $(BIN)/python "$(CONSTRAINTS)" test,plan

constraints:  # install the newest of everything on both ends, test that as CI does and write constraints/
	rm -rf $(VENV) $(NEWEST)
	$(MAKE) PYTHON=python3.11 CONSTRAINTS= install-plan
	$(MAKE) PYTHON=python3.11 CONSTRAINTS= lint test-newest test
	.ci/freeze $(BIN)/python >constraints/python3.11.txt
	.ci/freeze $(NEWEST)/bin/python >constraints/newest.txt
	$(MAKE) locks

locks:  # the hashes of the versions in constraints/*.txt
	.ci/lock

audit: install-test  # known vulnerabilities in what the locks install, where pip-audit reaches its service
	$(BIN)/python .ci/audit

format: install-test  # mend the style where ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  # remove environments, data and runs
	rm -rf $(VENV) $(NEWEST) data runs build *.egg-info
