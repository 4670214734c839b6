"""Triton kernels for CUDA devices. They know torch alone: no store, no transformers.

Every kernel has a plain torch function beside it that says what it computes. Keys and values are reached through a table of
addresses in device memory rather than as arguments, so that a captured CUDA graph serves every prompt, whatever memory its
buffers lie in.
"""

from __future__ import annotations

from cachetune_rag.kernels.support import CODECS, HAS_TRITON, kernels_run_on, row_addresses, rows_of

__all__ = ["CODECS", "HAS_TRITON", "kernels_run_on", "row_addresses", "rows_of"]
