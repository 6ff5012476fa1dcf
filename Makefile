# Everything runs from .venv, which `install` makes. No target needs a GPU, a model hub or root.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install install-dev fetch-model demo test test-long test-families test-algorithms realdata train-rm-hh rm-loop-hh bench-memory bench-vocabulary bench-packing bench-optune gpu-check check clean

BIN := .venv/bin
CONFIG ?= configs/quickstart.yaml
DATA ?= ../shared/data

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

install:  ## make .venv with the locked CPU packages
	@requirements/install.sh cpu

install-dev:  ## and with what tests and checks need
	@requirements/install.sh dev

fetch-model: install  ## put SmolLM2-135M-Instruct into models/
	@$(BIN)/python -m onlinerl.fetch

demo: install fetch-model  ## one small real run on the CPU, from nothing (older runs of it are moved aside)
	$(BIN)/onlinerl run $(CONFIG) --fresh

test: install-dev fetch-model  ## all tests, two files at a time: first the quick ones, then those that start engines and ranks
	$(BIN)/python -m pytest tests -m "not long and not families and not algorithms and not engine" -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest tests/e2e tests/gpu tests/integration -m "not long and not families and not algorithms and engine" -n 2 --dist loadfile --no-loadscope-reorder

test-long: install-dev  ## whole runs on real parts that `make test` has no time for: kills in further phases, replicas that fail (times in docs/results.md)
	$(BIN)/python -m pytest tests -m long

test-families: install-dev  ## every model family through engine and push, and in rows without padding (about 7 minutes)
	$(BIN)/python -m pytest tests/integration/test_families.py tests/unit/test_packing.py

test-algorithms: install-dev  ## every algorithm: a run on toys that learns, and one on real parts, each stopped and resumed (about half an hour)
	$(BIN)/python -m pytest tests -m algorithms

realdata: install fetch-model  ## GSM8K and HH dialogues, tensor parallel 2, ZeRO-3 (about an hour; needs the data, DATA=...)
	$(BIN)/python benchmarks/realdata.py --data $(DATA)

train-rm-hh: install fetch-model  ## reward models of HH dialogues, Bradley-Terry and general preference, held-out figures (needs the data, DATA=...)
	$(BIN)/python benchmarks/reward_models.py models --data $(DATA)

rm-loop-hh: install fetch-model  ## online DPO against the first of them, while a reward model of other pairs watches (needs the data, DATA=...)
	$(BIN)/python benchmarks/reward_models.py loop --data $(DATA)

bench-memory: install  ## peak memory of learner ranks with half a billion parameters, beside what `check` says (16 GiB, 10 minutes)
	$(BIN)/python benchmarks/zero3_memory.py --out runs/learner-memory.json

bench-vocabulary: install  ## peak memory of log-probs over a vocabulary of 150,000, all logits at once beside pieces (3 GiB, 5 minutes)
	$(BIN)/python benchmarks/vocabulary_memory.py --out runs/vocabulary-memory.json

bench-packing: install  ## time and memory of a training step without padding beside with it (5 minutes; lengths of real data with DATA=...)
	$(BIN)/python benchmarks/padding_free.py --data $(DATA) --out runs/padding-free.json

bench-optune: install fetch-model  ## responses that OPTune samples for the win rate of online DPO, three seeds (hours; goes on where it was stopped)
	$(BIN)/python benchmarks/optune.py

gpu-check: $(if $(PYTHON),,install-dev)  ## what works on this machine's GPUs, in at most 10 minutes (PYTHON=... of an environment with the gpu extra)
	@$(or $(PYTHON),$(BIN)/python) tools/gpu_check.py

check: install-dev  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## remove caches and .venv (runs/ and models/ are kept)
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
