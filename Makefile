# Two commands on a fresh machine with Python >= 3.10, a compiler and make: `make train` and `make test`.

PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help install train test test-packaging gpu-check lint clean

help:           ## Show the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

install: $(VENV)/installed  ## Create .venv and install hpkernels with what training and tests need

$(VENV)/installed: pyproject.toml setup.py CMakeLists.txt $(wildcard cmake/*.* csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip "setuptools>=77" "cmake>=3.24" ninja torch
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) -m pip install --no-build-isolation --editable ".[training,test]"
	touch $@

train: install  ## Train the quickstart preset on built-in images and write runs/quickstart/report.html
	$(RUN) -m training.train --config training/configs/quickstart.yaml

test: install   ## Run all tests and the doctests, some at a time
	$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test-packaging: install  ## Try the wheel with another PyTorch, and the kernels with the oldest Triton (gigabytes, minutes)
	$(RUN) -m pytest -m packaging tests

gpu-check:      ## On a GPU: build, test, sanitize, verify and measure with $(PYTHON), without network, in 9 minutes
	$(PYTHON) -m benchmarks gpu-check

lint: install   ## Check style
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:          ## Remove what the commands above made, except runs
	rm -rf $(VENV) build gpu-check dist *.egg-info hpkernels/_C* .pytest_cache .hypothesis .ruff_cache
