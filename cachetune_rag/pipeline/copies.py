"""Copies from page-locked memory by address.

A prompt of 32 chunks and 32 layers is a thousand copies. Torch takes the host ten microseconds for each (a view, checks, a
dispatch), which is longer than the device takes for the work between two of them; the CUDA runtime's own call takes one or two.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch

_HOST_TO_DEVICE = 1

CopyToDevice = Callable[[int, int, int, int], None]
"""Queues a copy: (device address, host address, bytes, stream)."""


@cache
def copy_to_device() -> CopyToDevice | None:
    """The CUDA runtime's asynchronous copy, from the library that torch itself uses; None if it can't be found."""
    if torch.version.cuda is None:
        return None
    try:
        runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
        call = runtime.cudaMemcpyAsync
    except (OSError, AttributeError):
        return None
    call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    call.restype = ctypes.c_int

    def copy(device: int, host: int, count: int, stream: int) -> None:
        status = call(device, host, count, _HOST_TO_DEVICE, stream)
        if status:
            raise RuntimeError(f"cudaMemcpyAsync of {count} bytes to the device failed with CUDA error {status}")

    return copy
