# Everything starts from a fresh machine: each target installs what it needs.
# The newest Python here that can make an environment; requirements.txt has the newest JAX for 3.12 and later.
NEWEST = for python in python3.13 "$$HOME"/.pyenv/versions/3.13.*/bin/python \
                       python3.12 "$$HOME"/.pyenv/versions/3.12.*/bin/python python3; do \
           "$$python" -c 'import ensurepip, venv' 2>/dev/null && echo "$$python" && break; done
PYTHON ?= $(or $(shell $(NEWEST)),python3)
VENV ?= .venv
PY := $(VENV)/bin/python
export JAX_PLATFORMS ?= cpu

.PHONY: env plan train test fast check smoke clean python

env: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Fovea needs Python 3.11 or newer; this is " + sys.version.split()[0] + " (set PYTHON=...)")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@touch $@

# What `train.py --plan` needs besides.
plan: env $(VENV)/.installed-plan

$(VENV)/.installed-plan: requirements-plan.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --requirement requirements-plan.txt
	@touch $@

train: env
	$(PY) train.py --config=configs/quickstart.py --workdir=runs/quickstart
	$(PY) eval.py --workdir=runs/quickstart

check: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

test: check plan
	$(PY) -m pytest -n 2 --dist=worksteal

# The set to run between two edits.
fast: env
	$(PY) -m pytest -n 2 --dist=worksteal -m "not slow and not multiprocess and not plan"

# A cross-section for another Python and another JAX: make smoke PYTHON=python3.11 VENV=.venv311
smoke: env
	$(PY) -m pytest -n 2 -m "smoke and not slow and not plan"

# Which Python the environment is made with.
python:
	@echo $(PYTHON)

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
