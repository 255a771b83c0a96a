# make setup: .venv with the project.  make demo: the embedded experiment.  make test: what CI runs.
# make up: Prefect and MLflow servers, a worker and the deployments on this machine; tell down ends them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Without a GPU the CPU build of torch is enough: make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export MLFLOW_DISABLE_TELEMETRY ?= true
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false

.PHONY: setup demo up test lint slow gpu bench bench-run faults test-servers docs audit clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/tell demo

up: setup
	$(BIN)/tell up

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup lint
	$(BIN)/pytest

slow: setup
	$(BIN)/pytest -m slow

# Tests and benchmarks of a GPU, results in GPU_OUT; installs nothing: docs/performance.md says what it
# needs. GPU_MODEL=DIR (SmolLM2-135M) and GPU_MIXTURE=BUNDLE/inputs measure more; GPU_DEVICE=cpu tries it.
GPU_OUT ?= gpu-results
GPU_DEVICE ?= cuda
gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py --device $(GPU_DEVICE) --out $(GPU_OUT) \
	  $(if $(GPU_MODEL),--model $(GPU_MODEL)) $(if $(GPU_MIXTURE),--mixture $(GPU_MIXTURE)) $(GPU_OPTIONS)

# Every fault drill, slow ones included. What was seen: docs/reliability.md.
faults: setup
	$(BIN)/pytest -m faults

# Prefect and MLflow on PostgreSQL, artifacts in an S3 store; needs PostgreSQL's package.
test-servers: setup
	$(BIN)/pytest -m servers

docs: setup
	$(BIN)/python -m tell_core.spec.reference > docs/specification.md
	$(BIN)/python -m flows.reference > docs/commands.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Known advisories against the pinned versions; needs the network.
audit: setup
	$(BIN)/pip install -q pip-audit
	$(BIN)/pip-audit --no-deps --disable-pip -r constraints.txt

# Benchmarks that bring their own data. Those that need other data or peers say how they are called.
bench: setup
	$(BIN)/python benchmarks/bootstrap.py
	$(BIN)/python benchmarks/adaptive.py
	$(BIN)/python benchmarks/quanta.py
	$(BIN)/python benchmarks/token_budgets.py index
	$(BIN)/python benchmarks/token_budgets.py plan

# Benchmarks on a finished run, by default the demo's: make bench-run RUN=DIR MODEL=DIR
RUN ?= runs/demo
WORLD = $(firstword $(wildcard $(RUN)/stages/world-*))
MODEL ?= $(WORLD)/base/model
MIXTURE ?= $(patsubst %/,%,$(dir $(firstword $(wildcard $(RUN)/stages/mix-*/mixture_index.safetensors))))
bench-run: setup
	$(BIN)/python benchmarks/training.py --mixture $(MIXTURE) --model $(MODEL)
	$(BIN)/python benchmarks/layouts.py --mixture $(MIXTURE) --model $(MODEL)
	$(BIN)/python benchmarks/checkpoints.py --model $(MODEL) --method lora
	$(BIN)/python benchmarks/checkpoints.py --model $(MODEL) --method full
	$(BIN)/python benchmarks/shared_base.py --mixture $(MIXTURE) --model $(MODEL)
	$(BIN)/python benchmarks/generation.py --model $(MODEL)
	$(BIN)/python benchmarks/scoring.py --model $(MODEL) --inputs $(MIXTURE)
	$(if $(WORLD),$(BIN)/python benchmarks/orchestration_overhead.py --world $(WORLD))
	$(if $(WORLD),$(BIN)/python benchmarks/selection.py $(WORLD))
	$(if $(WORLD),$(BIN)/python benchmarks/probes.py --world $(WORLD))

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
