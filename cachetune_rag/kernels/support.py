"""What the kernels share: whether they can run, dtypes, and the table of the buffers' addresses."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
CODECS = frozenset({"exact", "fp8", "int4", "int8"})
"""Codecs whose rows the `place` kernel can decode. Rows of other codecs are decoded by the codec's own code."""

LOG2E = 1.4426950408889634

Listed = tuple[Tensor, Tensor]
"""Some of a prompt's rows: their places, int32 [at least count], ascending, and how many there are, int64 [1], both on the device."""


def kernels_run_on(device: torch.device) -> bool:
    """Whether the kernels run on this device. On a CPU they do only in Triton's interpreter, which tests use."""
    if not HAS_TRITON:
        return False
    if device.type == "cuda":
        # On GPUs older than Ampere, Triton's matrix products of 16-bit types are slow or missing.
        return torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def row_addresses(key_rows: Sequence[Tensor], value_rows: Sequence[Tensor]) -> list[int]:
    """The addresses of a prompt's rows, as kernels take them: keys of layer 0, values of layer 0, keys of layer 1, ...

    They go into a table in device memory, int64 [2 * layers], which a kernel reads when it runs and not when it is captured.
    """
    return [t.data_ptr() for pair in zip(key_rows, value_rows, strict=True) for t in pair]


def rows_of(counts: Sequence[int]) -> npt.NDArray[np.int64]:
    """Source and number of every row, as `place` takes them: int64 [sum of counts], source << 32 | number.

    Made with NumPy, because torch takes longer to wake its threads than the work takes.
    """
    numbers = [np.arange(count, dtype=np.int64) + (source << 32) for source, count in enumerate(counts)]
    return np.concatenate(numbers) if numbers else np.empty(0, np.int64)


def power_of_two(count: int, least: int = 1) -> int:
    """The smallest power of two that is neither below `count` nor below `least`."""
    return max(least, 1 << max(0, count - 1).bit_length())


def aligned(dim: int, v_dim: int, dtype: torch.dtype) -> bool:
    """Whether every head of every row begins at a multiple of 16 bytes."""
    return dim * dtype.itemsize % 16 == 0 and v_dim * dtype.itemsize % 16 == 0


def precision(dtype: torch.dtype) -> str:
    """How matrix products are computed: float32 in full precision, so that recomputed rows are what the model itself computes."""
    return "ieee" if dtype == torch.float32 else "tf32"
