"""The CUDA runtime library that torch itself uses, for the few calls that torch has no name for."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

__all__ = ["forget_error", "major", "runtime"]


def major() -> int:
    """Its major version; 0 where torch has no CUDA."""
    return 0 if torch.version.cuda is None else int(torch.version.cuda.split(".")[0])


@cache
def runtime() -> ctypes.CDLL | None:
    """The library; None if it can't be found."""
    if not major():
        return None
    try:
        return ctypes.CDLL(f"libcudart.so.{major()}")
    except OSError:
        return None


def forget_error() -> None:
    """Forget the calling thread's last error: handled here, torch would raise it at whatever this thread does next."""
    library = runtime()
    if library is not None:
        library.cudaGetLastError()
