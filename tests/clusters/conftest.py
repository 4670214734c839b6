"""A Ray cluster on this machine, one for all tests of a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import watched_writes

ROOT = Path(__file__).parent.parent.parent
PATHS = [ROOT, ROOT / "store", ROOT / "adapters", ROOT / "tests", Path(__file__).parent]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def writes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `watched_writes` notes what is written."""
    return tmp_path_factory.mktemp("writes")


@pytest.fixture(scope="module")
def cluster(writes: Path) -> Iterator[None]:
    ray = pytest.importorskip("ray")
    ray.init(
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=200 << 20,
        runtime_env={
            "env_vars": {
                "PYTHONPATH": os.pathsep.join([*map(str, PATHS), *filter(None, sys.path)]),
                watched_writes.FOLDER: str(writes),
            },
            "worker_process_setup_hook": "watched_writes.install",
        },
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()
