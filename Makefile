# Every target sets itself up: a virtual environment with pinned packages, and (where needed) the demo model.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Processes that run tests at once; 0: no further ones, as a plain `pytest`.
WORKERS ?= 2

.PHONY: demo test soak lint format typecheck bench quality clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python examples/smollm2.py
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy adapters

soak: $(READY)
	$(BIN)/python tests/soak/run.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/ttft.py

quality: $(READY)
	$(BIN)/python benchmarks/quality.py --quick

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "cachetune-rag needs Python 3.11 or newer; run make PYTHON=python3.11")'
	@echo "Setting up $(VENV): a virtual environment, then the packages of constraints.txt (some GB, a few minutes, once)."
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip==25.3"
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[all]" --group dev
	touch $(READY)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
