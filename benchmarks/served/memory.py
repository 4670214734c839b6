"""How much memory of a GPU is in use, whichever process has it."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import torch

EVERY = 0.02
"""Seconds between two looks."""


class DeviceMemory:
    """Looks at the device while it is open, and remembers the most.

    Attributes:
        most: bytes that were in use at once; None without a GPU.
    """

    def __init__(self) -> None:
        self.most: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="device-memory", daemon=True)

    def __enter__(self) -> Self:
        if torch.cuda.is_available():
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _look(self) -> None:
        while True:
            free, every = torch.cuda.mem_get_info()
            self.most = max(self.most or 0, every - free)
            if self._ended.wait(EVERY):
                return
