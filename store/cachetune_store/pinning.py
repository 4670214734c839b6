"""Page-locking memory for a GPU.

Memory of the process's own is locked, in huge pages and of the size that is needed; torch's page-locked memory is rounded
up to powers of two, so that a budget would hold fewer chunks.
"""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import torch

__all__ = ["pin", "unpin", "wait_for_copies"]

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every GPU


def pin(area: mmap.mmap) -> bool:
    """Page-lock `area`; False if CUDA refuses."""
    return int(torch.cuda.cudart().cudaHostRegister(_address(area), len(area), _PORTABLE)) == 0


def unpin(area: mmap.mmap) -> None:
    """Undo pin(); must come before the memory is unmapped."""
    # At the end of a process CUDA may be gone already.
    with contextlib.suppress(RuntimeError):
        torch.cuda.cudart().cudaHostUnregister(_address(area))


def wait_for_copies() -> None:
    """Return when no GPU that this process uses is copying any more."""
    for device in range(torch.cuda.device_count()):
        # Asking the others to wait would set them up first.
        if torch.cuda.memory_reserved(device):
            torch.cuda.synchronize(device)


def _address(area: mmap.mmap) -> int:
    return int(np.frombuffer(area, dtype=np.uint8).ctypes.data)
