# Everything starts from a fresh machine: each target installs what it needs.
# The newest Python here that can make an environment; requirements.txt has the newest JAX for 3.12 and later.
NEWEST = for python in python3.13 "$$HOME"/.pyenv/versions/3.13.*/bin/python \
                       python3.12 "$$HOME"/.pyenv/versions/3.12.*/bin/python python3; do \
           "$$python" -c 'import ensurepip, venv' 2>/dev/null && echo "$$python" && break; done
PYTHON ?= $(or $(shell $(NEWEST)),python3)
VENV ?= .venv
PY := $(VENV)/bin/python
# The extra of JAX for what is here: cuda13, cuda12 for drivers before 580, tpu or cpu; `make train ACCELERATOR=cpu` says another.
ACCELERATOR ?= $(shell driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed -n '1s/[.].*//p'); \
                       if [ "$$driver" -ge 580 ] 2>/dev/null; then echo cuda13; \
                       elif [ "$$driver" -gt 0 ] 2>/dev/null; then echo cuda12; \
                       elif grep -qs 0x1ae0 /sys/bus/pci/devices/*/vendor && ls /dev/accel* /dev/vfio/[0-9]* >/dev/null 2>&1; then echo tpu; \
                       else echo cpu; fi)
INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: env accelerator plan site train test fast check smoke clean python

# Tests compare with what CPUs compute.
test fast smoke: export JAX_PLATFORMS ?= cpu

env: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Fovea needs Python 3.11 or newer; this is " + sys.version.split()[0] + " (set PYTHON=...)")'
	@echo "installing what Fovea needs into $(VENV): a minute or two"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --requirement requirements.txt
	@touch $@

# What JAX needs for the accelerator that is here.
accelerator: $(VENV)/.installed-$(ACCELERATOR)

$(VENV)/.installed-cpu: $(VENV)/.installed
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	@echo "installing JAX for $*: some GB (ACCELERATOR=cpu goes without)"
	$(INSTALL) --constraint requirements.txt "jax[$*]"
	@touch $@

# What `train.py --plan` needs besides.
plan: env $(VENV)/.installed-plan

$(VENV)/.installed-plan: requirements-plan.txt
	$(INSTALL) --requirement requirements-plan.txt
	@touch $@

# The pages as a site; one without a place in mkdocs.yml, or a link that leads nowhere, is an error.
# Not --quiet, which drops warnings before they are counted.
site: env $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict
	@echo "site/index.html is the first page; with search: $(PY) -m http.server --directory site"

$(VENV)/.installed-docs: requirements-docs.txt
	$(INSTALL) --requirement requirements-docs.txt
	@touch $@

train: accelerator
	$(PY) train.py --config=configs/quickstart.py --workdir=runs/quickstart
	$(PY) eval.py --workdir=runs/quickstart

check: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

test: check plan site
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
	rm -rf $(VENV) runs site .pytest_cache .mypy_cache .ruff_cache
