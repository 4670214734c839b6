"""Triton kernels for CUDA devices. They know torch alone: no store, no transformers.

`tests/kernels/kernel_reference.py` says in plain torch what each kernel computes. Kernels find keys and values through a table of
addresses in device memory, and not as arguments. A captured CUDA graph therefore serves every prompt, wherever its buffers are.
"""

from __future__ import annotations

from cachetune_rag.kernels.support import CODECS, HAS_TRITON, Listed, kernels_run_on, row_addresses, rows_of

__all__ = ["CODECS", "HAS_TRITON", "Listed", "kernels_run_on", "row_addresses", "rows_of"]
