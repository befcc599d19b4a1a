# make demo   a small checkpoint, a real engine generating from it, and transformers as the oracle
# make test   lint, types and every test that needs no GPU
# make gpu    the tests that need a Hopper GPU, in the Python that is active
# Environments are built under .venv with whatever index pip is configured for, and kept.

PYTHON ?= python3.11
PIP = -m pip --disable-pip-version-check
CONSTRAINTS = -c requirements/constraints.txt
# By hash whatever has the same bytes everywhere. Not torch: its CPU and CUDA builds of one version differ, and which of
# them an index has is its business. It is pinned by version, and brings the CUDA libraries that its build asks for.
HASHED = $(PIP) install --no-deps --require-hashes
OURS = $(PIP) install --no-deps --no-build-isolation -e .
CORE = .venv/core/bin/python
VLLM = .venv/vllm/bin/python
SGLANG = .venv/sglang/bin/python
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)

.PHONY: demo test lint test-core test-vllm test-sglang gpu reliability requirements clean
.DELETE_ON_ERROR:

demo: .venv/vllm/ready
	$(VLLM) -m hopper_mxfp4 check || test -z "$(GPU)"
	$(VLLM) -m hopper_mxfp4 demo

# Every part runs, whatever became of the others, and the end says which failed.
PARTS = lint test-core test-vllm $(if $(GPU),,$(CONTRACT:%=contract-%)) test-sglang $(SGLANG_CONTRACT:%=sglang-contract-%)

test:
	@failed=; \
	for part in $(PARTS); do echo "=== $$part"; $(MAKE) --no-print-directory $$part || failed="$$failed $$part"; done; \
	echo "=== make test"; \
	if test -n "$$failed"; then echo "failed:$$failed"; exit 1; fi; \
	echo "every part passed: $(PARTS)"

lint: .venv/core/ready
	$(CORE) -m ruff check .
	$(CORE) -m ruff format --check .
	$(CORE) -m mypy
	.venv/core/bin/lint-imports

test-core: .venv/core/ready
	$(CORE) -m pytest tests/core tests/gpu

# The oldest and the newest vLLM that are fully supported: the CUDA wheels' Python over the CPU engine's
# environment, for all that needs no kernel of vLLM's. 0.32.0, the CPU engine itself, runs everything.
CONTRACT = 0.29.0 0.33.0
CONTRACT_TESTS = selection layers checkpoints all_to_all

test-vllm: .venv/vllm/ready
	$(VLLM) -m pytest tests/vllm

contract-%: .venv/vllm-%/ready
	PYTHONPATH=.venv/vllm-$* VLLM_TARGET_DEVICE=cpu $(VLLM) -m pytest $(CONTRACT_TESTS:%=tests/vllm/test_%.py)

.venv/vllm-%/ready: .venv/vllm/ready
	rm -rf .venv/vllm-$*
	$(VLLM) $(HASHED) --target .venv/vllm-$* -r requirements/vllm-$*.txt
	touch $@

# SGLang's own Python without its kernels; then its oldest release that is fully supported, and the oldest that loads.
SGLANG_CONTRACT = 0.5.19 0.5.12

test-sglang: .venv/sglang/ready
	CUDA_VISIBLE_DEVICES= $(SGLANG) -m pytest tests/sglang

sglang-contract-%: .venv/sglang-%/ready
	CUDA_VISIBLE_DEVICES= PYTHONPATH=.venv/sglang-$* $(SGLANG) -m pytest tests/sglang

.venv/sglang-%/ready: .venv/sglang/ready requirements/sglang-older.txt
	rm -rf .venv/sglang-$*
	$(SGLANG) $(PIP) install --no-deps --target .venv/sglang-$* sglang==$* -r requirements/sglang-older.txt
	touch $@

.PRECIOUS: .venv/vllm-%/ready .venv/sglang-%/ready

gpu:
	python3 -m pytest tests/gpu -m gpu --gpu-results benchmarks/results/gpu-tests.json
	python3 docs/dev/generate/gpu_tests_table.py
	python3 docs/dev/generate/reliability_table.py

.venv/core/ready: pyproject.toml requirements/constraints.txt requirements/core.txt
	$(PYTHON) -m venv --clear .venv/core
	$(CORE) $(HASHED) -r requirements/core.txt
	$(CORE) $(PIP) install $(CONSTRAINTS) torch
	$(CORE) $(OURS)
	$(CORE) $(PIP) check
	touch $@

# Without a GPU: vLLM's CPU engine, less torchvision, torchaudio and torchcodec, which it asks for: their builds on
# the index need a CUDA torch, and beside a CPU torch transformers then fails to import. Neither needs them here.
.venv/vllm/ready: pyproject.toml requirements/constraints.txt requirements/vllm.txt
	$(PYTHON) -m venv --clear .venv/vllm
ifeq ($(GPU),)
	$(VLLM) $(HASHED) -r requirements/vllm.txt
	$(VLLM) $(PIP) install $(CONSTRAINTS) torch
	$(VLLM) $(OURS)
else
	$(VLLM) $(PIP) install -e '.[test,demo,vllm,flashinfer]'
endif
	touch $@

.venv/sglang/ready: pyproject.toml requirements/constraints.txt requirements/sglang.txt
	$(PYTHON) -m venv --clear .venv/sglang
	$(SGLANG) $(PIP) install $(CONSTRAINTS) torch -r requirements/sglang.txt -e '.[test]'
	$(SGLANG) $(PIP) install $(CONSTRAINTS) --no-deps sglang
	touch $@

# The hashed requirements anew, from pyproject.toml and the versions in constraints.txt. Needs uv.
UV = uv pip compile --config-file requirements/uv.toml --python-version 3.11 --generate-hashes --no-header --no-annotate
LOCK = $(UV) --python-platform x86_64-manylinux_2_34 --extra test --extra demo $(CONSTRAINTS) pyproject.toml \
	$(foreach p,torch torchvision torchaudio torchcodec,--no-emit-package $(p))

requirements:
	$(LOCK) requirements/core.in -o requirements/core.txt
	$(LOCK) requirements/vllm.in -o requirements/vllm.txt
	$(foreach v,$(CONTRACT),echo vllm==$(v) | $(UV) --no-deps - -o requirements/vllm-$(v).txt &&) true

# docs/dev/evidence/reliability.md from what the tests without a GPU see now, and what the last `make gpu` saw.
reliability: .venv/core/ready
	$(CORE) -m pytest tests/core --results benchmarks/results/core-tests.json
	$(CORE) docs/dev/generate/reliability_table.py

clean:
	rm -rf .venv .demo dist build
