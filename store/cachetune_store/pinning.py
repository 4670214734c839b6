"""Page-locking memory for a GPU, and waiting for a GPU's copies.

None of this runs while a CUDA graph is captured. If any thread waits for the device then, the capture fails, and memory can't be
unlocked during a capture.

The process's own memory is locked, in huge pages and of just the size that is needed. torch rounds its page-locked memory up to powers of
two, so that fewer chunks would fit into a budget.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator

import numpy as np
import torch

from . import cudart

__all__ = ["capturing", "devices_in_use", "pin", "unpin", "wait_for_copies"]

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every GPU
_PAGE = 4096
"""The smallest pages that a system has."""

_device = threading.RLock()
_locked: list[mmap.mmap] = []
"""Memory that could not be unlocked. It is never unmapped, because CUDA would refuse to lock other memory at its address."""


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """While the context is open, other threads wait before they use this module."""
    with _device:
        yield


def pin(area: mmap.mmap) -> bool:
    """Page-lock `area`. Returns False if CUDA refuses.

    Its pages are made first. CUDA would make them as well, but one thread at a time, and whoever else wants something of the GPU meanwhile (the next step of a
    server, say) waits for CUDA's lock.
    """
    pages = np.frombuffer(area, dtype=np.uint8)[::_PAGE]
    pages |= 0  # without the interpreter's lock
    with _device:
        return _done(torch.cuda.cudart().cudaHostRegister(_address(area), len(area), _PORTABLE))


def unpin(area: mmap.mmap) -> None:
    """Undo pin(). Call it before the memory is unmapped."""
    # When the process ends, CUDA may have ended before.
    with contextlib.suppress(RuntimeError), _device:
        if not _done(torch.cuda.cudart().cudaHostUnregister(_address(area))):
            _locked.append(area)


def wait_for_copies(device: torch.device | None = None) -> None:
    """Wait until `device` has done all its work, or all GPUs that this process uses."""
    with _device:
        if device is not None:
            torch.cuda.synchronize(device)
            return
        # Waiting for a GPU that this process doesn't use would initialise it.
        for number in devices_in_use():
            torch.cuda.synchronize(number)


def devices_in_use() -> list[int]:
    """Numbers of the GPUs that this process has memory on."""
    return [number for number in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(number)]


def _done(status: object) -> bool:
    """Whether a call of the runtime succeeded. If not, its error is cleared, so that no later call raises it."""
    if int(status) == 0:  # type: ignore[call-overload]
        return True
    cudart.forget_error()
    return False


def _address(area: mmap.mmap) -> int:
    return int(np.frombuffer(area, dtype=np.uint8).ctypes.data)
