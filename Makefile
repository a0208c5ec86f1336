# Needs GNU make and Python 3.11 or newer: `make lab PYTHON=python3.12` names another one.
# Without make: pip install -e . && vlm-course lab

PYTHON ?= python3
VENV   ?= .venv
OLDEST ?= .venv-oldest
# How many test processes run at once, and how many threads each one's arithmetic may use.
JOBS   ?= 2
# What `make coverage` runs, in this order.
ROOMS  ?= $(sort $(dir $(wildcard tests/*/test_*.py)))
BIN    := $(VENV)/bin
PIP    := -m pip --disable-pip-version-check --quiet

export PYTHONHASHSEED := 0

.DEFAULT_GOAL := help
.PHONY: help lab test build bench coverage test-oldest mutate

help:
	@echo "make lab          install, and open the course in JupyterLab"
	@echo "make test         install, then run every test and every notebook"
	@echo "make build        rebuild the notebooks from solutions/"
	@echo "make bench        measure speed beside the peers"
	@echo "make coverage     list the lines of the package that no test runs"
	@echo "make test-oldest  run the tests on the oldest supported version of every dependency"
	@echo "make mutate       change the package's code on purpose and count the changes that the tests miss"

lab: $(VENV)/.installed
	@$(BIN)/vlm-course lab $(LAB)

test: $(VENV)/.installed-course
	$(BIN)/ruff check .
	$(BIN)/vlm-course build --check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) -m "not serial"
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -m serial
	$(BIN)/python tests/notebooks/run.py

build: $(VENV)/.installed-course
	$(BIN)/vlm-course build $(CHAPTERS)

bench: $(VENV)/.installed-course
	$(BIN)/python -m benchmarks $(BENCH)

# Folder by folder: what one folder's tests leave in memory does not slow down the next.
coverage: $(VENV)/.installed-course
	$(BIN)/coverage erase
	for room in $(ROOMS); do \
		OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -q -n $(JOBS) -m "not serial" $$room || exit 1; done
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

mutate: $(VENV)/.installed-course
	$(BIN)/python tests/mutate.py $(MODULES)

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -n $(JOBS) -m "not serial"

# The stamps make every later start instant; they go stale when the pins or the metadata change.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing the course into $(VENV): once, a few minutes, about 6.5 GB on Linux."
	@$(BIN)/python $(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-course: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing the course and what its tests need into $(VENV): once, a few minutes, about 6.5 GB on Linux."
	@$(BIN)/python $(PIP) install -c constraints.txt -e ".[course]"
	@touch $(VENV)/.installed $@

$(VENV)/bin/python:
	@$(call new-environment,$(VENV))

# Every dependency at the lower bound of its range in pyproject.toml. Their wheels are for Python 3.11 and 3.12.
$(OLDEST)/.installed: pyproject.toml constraints.txt tests/oldest.py
	@$(call new-environment,$(OLDEST))
	@echo "Installing the oldest supported versions into $(OLDEST): once, a few minutes, about 6.5 GB on Linux."
	@$(OLDEST)/bin/python tests/oldest.py > $(OLDEST)/constraints.txt
	@$(OLDEST)/bin/python $(PIP) install -c $(OLDEST)/constraints.txt -e ".[course]"
	@touch $@

define new-environment
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "This course needs Python 3.11 or newer, and '$(PYTHON)' is not: name one with  make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }; \
$(PYTHON) -m venv $(1) || \
	{ echo "Python could not make the environment $(1): its venv module is missing (on Debian and Ubuntu: apt install python3-venv)."; exit 1; }
endef
