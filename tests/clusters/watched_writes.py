"""Runs in every process of a test's cluster: notes each chunk that is written, and kills the process where a test asks for it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import wrapt

FOLDER = "CACHETUNE_TEST_WRITES"
"""The variable that names the folder in which writes are noted."""


def install() -> None:
    """Watch all stores of this process, from when their module is imported: most of Ray's processes never need it, and it takes seconds."""
    wrapt.register_post_import_hook(watch, "cachetune_store.store")


def watch(stores: Any) -> None:
    original = stores.ChunkStore.write

    def write(self: Any, chunk: Any) -> int:
        written: int = original(self, chunk)
        note(str(chunk.key))
        return written

    stores.ChunkStore.write = write


def note(key: str) -> None:
    folder = Path(os.environ[FOLDER])
    with (folder / "written").open("a") as file:  # a short line that is appended is written whole
        file.write(f"{key} {os.getpid()}\n")
    mine = sum(line.endswith(f" {os.getpid()}") for line in (folder / "written").read_text().splitlines())
    for wish in folder.glob("kill-after-*"):
        if mine >= int(wish.name.removeprefix("kill-after-")):
            try:
                wish.unlink()  # one process alone can do this
            except FileNotFoundError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)
