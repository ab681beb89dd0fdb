# Two commands on a fresh machine with Python >= 3.10, a compiler and make: `make train` and `make test`.

PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python
LINT   := .venv-lint
DOCS   := .venv-docs
NATIVE := CMakeLists.txt $(wildcard cmake/*.* csrc/*.* csrc/*/*.*)
# The CUDA kernels compiled for the CPU: without a GPU they are tested so.
EMULATED := build/emulated/_C_cuda_emulated.so

# Threads that wait for each other sleep. By default they spin, and take the processor from those they wait for if the
# machine does other work as well.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help install train screenshots test test-all test-deep test-packaging wheel gpu-check lint docs docs-serve clean

help:           ## Show the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

install: $(VENV)/installed  ## Create .venv and install hpkernels with what training and tests need

# Of nvidia-cutlass only the headers are needed. Without it there are no kernels for sm_90a, and the report says so.
$(VENV)/installed: pyproject.toml setup.py $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip "setuptools>=77" "cmake>=3.24" ninja torch
	-$(RUN) -m pip install --quiet --no-deps "nvidia-cutlass==4.2.0.0"
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) -m pip install --no-build-isolation --editable ".[training,test]"
	touch $@

train: install  ## Train the quickstart preset on built-in images and write runs/quickstart/report.html
	$(RUN) -m training.train --config training/configs/quickstart.yaml

screenshots: install  ## Photograph runs/quickstart/report.html for the docs; needs Chromium and its driver
	$(RUN) tests/training/screenshots.py runs/quickstart/report.html docs/images

PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test: install $(EMULATED)  ## Run the tests and the doctests, some at a time
	$(PYTEST)

test-all: install $(EMULATED)  ## Run them for every target and dtype, with more examples and sanitizers
	HPKERNELS_DEEP_TESTS=1 $(PYTEST) -m "not packaging"

test-deep: install $(EMULATED)  ## Run what `make test` leaves to `make test-all`, but for repetitions
	$(PYTEST) -m "deep and not repeated"

# Goes on without it where it cannot be configured, which is where CUDA's headers are missing; the tests say so as well.
$(EMULATED): $(NATIVE) | install
	@mkdir -p $(@D); PATH="$(CURDIR)/$(VENV)/bin:$$PATH"; \
	if cmake -S . -B $(@D) -G Ninja -DHPKERNELS_CPU=OFF -DHPKERNELS_EMULATED=ON -DHPKERNELS_CUTLASS="$$HPKERNELS_CUTLASS" \
	  -DHPKERNELS_TORCH="$$($(RUN) -c 'import torch; print(torch.__path__[0])')" > $(@D).log 2>&1; \
	then cmake --build $(@D) && touch $@; \
	else echo "going on without the emulated CUDA kernels, which need CUDA's headers: $(@D).log"; fi

# The check of dependencies is skipped since nvidia-cutlass is installed without its own.
# auditwheel reads from the libraries which glibc they need, and names the wheel after that; PyTorch's stay out of it.
wheel: $(VENV)/release  ## Build the source archive, and from that the wheel, into dist/
	rm -rf build/wheel dist
	PATH="$(abspath $(VENV)/bin):$$PATH" $(RUN) -m build --no-isolation --skip-dependency-check --outdir build/wheel
	PATH="$(abspath $(VENV)/bin):$$PATH" $(RUN) -m auditwheel repair --exclude 'libtorch*' --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist
	$(RUN) -m twine check --strict dist/*

$(VENV)/release: pyproject.toml | install
	$(RUN) -m pip install --quiet --group release
	touch $@

test-packaging: $(VENV)/release  ## Try the wheel with the oldest and newest PyTorch, the kernels with the oldest Triton; slow
	$(RUN) -m pytest -m packaging tests

gpu-check:      ## On a GPU: build, prove, test and measure with $(PYTHON), without network; 9 minutes a PART (right, measure, sweeps)
	$(PYTHON) -m benchmarks gpu-check $(addprefix --part ,$(PART))

lint: $(LINT)/installed  ## Check style and types; needs neither PyTorch nor a compiler
	$(LINT)/bin/ruff check .
	$(LINT)/bin/ruff format --check .
	@if $(RUN) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2> /dev/null; \
	then set -- --strict --python-executable $(RUN); \
	else echo "going on without PyTorch ($(VENV) has none, see make install): types are checked loosely"; \
	  set -- --ignore-missing-imports --no-site-packages; fi; \
	$(LINT)/bin/mypy "$$@" -p hpkernels && $(LINT)/bin/mypy "$$@" tests/typing/user_program.py

$(LINT)/installed: pyproject.toml
	$(PYTHON) -m venv $(LINT)
	$(LINT)/bin/python -m pip install --quiet "mypy>=1.18" "ruff>=0.6"
	touch $@

# mkdocs-material tells every build of its end of life in 2027, which pyproject.toml answers by the versions it takes.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(DOCS)/installed  ## Build the documentation site, build/site/index.html; fails on a broken link
	$(DOCS)/bin/mkdocs build

docs-serve: export NO_MKDOCS_2_WARNING := 1
docs-serve: $(DOCS)/installed  ## Show the site at http://127.0.0.1:8000, and again as pages change
	$(DOCS)/bin/mkdocs serve --watch hpkernels

# Reads the package's sources without importing them, and so needs neither PyTorch nor a compiler.
$(DOCS)/installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade pip
	$(DOCS)/bin/python -m pip install --quiet --group docs
	touch $@

clean:          ## Remove what the commands above made, except runs
	rm -rf $(VENV) $(LINT) $(DOCS) build gpu-check dist *.egg-info hpkernels/_C* .pytest_cache .hypothesis .ruff_cache .mypy_cache
