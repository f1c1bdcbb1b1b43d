# On a fresh machine with Python 3.11 (venv) and make: `make simulate`, `make test`. Set-up runs once for a given lock.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV := $(VENV)/uv
ARGS ?=
JOBS ?= 2

# TensorFlow speaks of its devices and plugins at every start; users asked for none of it.
export TF_CPP_MIN_LOG_LEVEL ?= 2
export PYTHONDONTWRITEBYTECODE =

.PHONY: help setup simulate test check format lock stubs clean

help:
	@echo "make simulate   set up, then run five hospitals on generated images, end to end"
	@echo "make test       set up, then the checks and the tests in two processes (JOBS=2), of 7 GB at most"
	@echo "make check      ruff and mypy"
	@echo "make format     ruff's formatter and its safe fixes"
	@echo "make lock       renew requirements.lock (uv)"
	@echo "make stubs      regenerate the gRPC stubs from common/wire/*.proto"

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Wardround needs Python 3.11 with venv; $(PYTHON) was not found. Set PYTHON=/path/to/python3.11."; exit 2; }
	@echo "Setting up $(VENV): about two minutes, once."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@touch $@

simulate: $(READY)
	$(BIN)/wardround simulate $(ARGS)

test: check
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock:
	test -x $(UV)/bin/uv || { $(PYTHON) -m venv $(UV) && $(UV)/bin/pip install -qq --disable-pip-version-check uv; }
	$(UV)/bin/uv pip compile pyproject.toml --group dev --python-version 3.11 --generate-hashes \
	    --no-emit-index-url --no-header --upgrade --quiet --output-file requirements.lock

stubs: $(READY)
	$(BIN)/python -m grpc_tools.protoc --proto_path=. --python_out=. --pyi_out=. --grpc_python_out=. \
	    common/wire/federation.proto common/wire/enrolment.proto common/wire/operation.proto

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
