PYTHON ?= python3
VENV ?= .venv
ifndef GPUS
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU ')
endif
# "+cpu" names PyTorch's CPU build for Linux, so pip cannot answer with gigabytes of CUDA packages. Elsewhere the plain
# build has no CUDA.
TORCH ?= torch==2.13.0$(if $(filter 0,$(GPUS)),$(if $(filter Linux,$(shell uname)),+cpu))
PIP_TORCH_ARGS ?=
EXTRAS ?= dev

override VENV := $(abspath $(VENV))
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
STAMP := $(VENV)/.installed
CONSTRAINTS := $(VENV)/constraints.txt
# ninja, which compiles DeepSpeed's operators at run time, is found by PATH.
RUN := PATH="$(VENV)/bin:$$PATH"

# Commas separate the arguments of a make function: the message must have none.
stop = { echo 'error: $(1)' >&2; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help install demo test test-gpu test-slurm check format clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo
	@echo 'Variables: PYTHON (3.11 or newer), VENV, GPUS (0 installs the CPU build of PyTorch), TORCH, EXTRAS,'
	@echo '           PIP_TORCH_ARGS (more arguments for the pip that installs PyTorch, see CONTRIBUTING.md)'

install: $(STAMP) ## Create .venv and install everything into it, once

demo: $(STAMP) ## Train a small model on two processes and show the result
	$(RUN) $(if $(filter 0 1,$(GPUS)),DS_ACCELERATOR=cpu) \
		mtp-dist launch --ranks 2 --config configs/demo.yaml \
		$(if $(filter 0 1,$(GPUS)),run.device=cpu)

test: $(STAMP) ## Run all tests
	$(RUN) $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-gpu: $(STAMP) ## Run the tests that need an NVIDIA GPU
	$(RUN) $(VENV)/bin/python -m pytest -m gpu tests/gpu $(PYTEST_ARGS)

test-slurm: $(STAMP) ## Install SLURM where it is missing (Debian, as root) and run the tests that need it
	@missing=$$(for daemon in slurmctld slurmd munged; do \
		PATH="$$PATH:/usr/sbin:/usr/local/sbin" command -v $$daemon >/dev/null || echo $$daemon; done); \
	[ -z "$$missing" ] || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; } || \
		$(call stop,these daemons of SLURM and munge are missing and only root on a Debian installs them here: '$$missing'); \
	[ -z "$$missing" ] || { apt-get update && DEBIAN_FRONTEND=noninteractive \
		apt-get install --yes --no-install-recommends slurm-wlm munge; }
	$(RUN) $(VENV)/bin/python -m pytest tests/slurm $(PYTEST_ARGS)

check: $(STAMP) ## Lint Python, shell scripts and the Dockerfile, check format, types and imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/shellcheck .ci/run launchers/*.sh launchers/slurm/*.sbatch
	$(VENV)/bin/hadolint docker/Dockerfile

format: $(STAMP) ## Format the code and apply the linter's safe fixes
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean: ## Remove caches and build products (not .venv, not runs)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

# PyTorch goes first: DeepSpeed's build looks at it, and the constraint keeps later steps from replacing it.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		$(call stop,$(PYTHON) is not Python 3.11 or newer: set PYTHON=<interpreter>)
	@echo 'Creating $(VENV)'
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(VENV)/bin/python install --quiet pip; }
	@$(PIP) install 'setuptools>=77.0.3' wheel
	@echo 'Installing $(TORCH)'
	@$(PIP) install $(PIP_TORCH_ARGS) '$(TORCH)' || \
		$(call stop,cannot install $(TORCH): name an index that has it with PIP_TORCH_ARGS; see CONTRIBUTING.md)
	@$(VENV)/bin/python -W ignore -c 'import sys, torch; sys.exit($(GPUS) == 0 and torch.version.cuda is not None)' || \
		$(call stop,no NVIDIA GPU here but $(VENV) has a CUDA build of PyTorch: delete it or set GPUS=1; see CONTRIBUTING.md)
	@$(VENV)/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(CONSTRAINTS)
	@echo 'Installing mtp-dist and what it needs (minutes)'
	@$(PIP) install --no-build-isolation --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	@touch $@
