"""Page-locking memory for a GPU, and waiting for its copies.

All of it is kept away from the capturing of CUDA graphs: a device that is waited for, on whatever thread, ends every capture under
way on it, and while one is under way memory can't be unlocked.

Memory of the process's own is locked, in huge pages and of the size that is needed; torch's page-locked memory is rounded
up to powers of two, so that a budget would hold fewer chunks.
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

_device = threading.RLock()
_locked: list[mmap.mmap] = []
"""What could not be unlocked: were it unmapped, CUDA would refuse to lock whatever comes to lie there."""


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """While the context is open, other threads that want something here wait."""
    with _device:
        yield


def pin(area: mmap.mmap) -> bool:
    """Page-lock `area`; False if CUDA refuses."""
    with _device:
        return _done(torch.cuda.cudart().cudaHostRegister(_address(area), len(area), _PORTABLE))


def unpin(area: mmap.mmap) -> None:
    """Undo pin(); must come before the memory is unmapped."""
    # At the end of a process CUDA may be gone already.
    with contextlib.suppress(RuntimeError), _device:
        if not _done(torch.cuda.cudart().cudaHostUnregister(_address(area))):
            _locked.append(area)


def wait_for_copies(device: torch.device | None = None) -> None:
    """Return when no GPU that this process uses is copying any more, or when `device` isn't."""
    with _device:
        if device is not None:
            torch.cuda.synchronize(device)
            return
        # Asking the others to wait would set them up first.
        for number in devices_in_use():
            torch.cuda.synchronize(number)


def devices_in_use() -> list[int]:
    """Numbers of the GPUs that this process has memory on."""
    return [number for number in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(number)]


def _done(status: object) -> bool:
    """Whether a call of the runtime's succeeded; if not, nobody else is to stumble over its error."""
    if int(status) == 0:  # type: ignore[call-overload]
        return True
    cudart.forget_error()
    return False


def _address(area: mmap.mmap) -> int:
    return int(np.frombuffer(area, dtype=np.uint8).ctypes.data)
