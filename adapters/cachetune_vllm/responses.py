"""What a response says of its prompt (`kv_transfer_params`), from the engine's report."""

from __future__ import annotations

from typing import Any

from cachetune_rag.report import Report
from cachetune_rag.reuse.state import NothingReused
from cachetune_vllm.reasons import Left
from cachetune_vllm.slow_disk import FromDisk, Plain

_SHOWN = (
    "prompt_tokens", "reused", "recomputed", "missed", "bytes_read", "ratio", "selector", "ttft", "timings", "prefix_kept", "damaged",
    "unreadable", "timed_out", "storing", "unstored", "skipped", "prediction", "continued", "advice",
)  # fmt: skip
"""The fields of a report that a response shows. None of them names a document, a path or another request."""


def nothing_reused(left: Left) -> dict[str, Any]:
    """What is said of a prompt that is left to vLLM."""
    return {"reused": 0, "left": left.value}


def why_nothing(state: NothingReused, plain: Plain | None) -> dict[str, Any]:
    """What is said of a prompt of which nothing was reused.

    Args:
        state: what its lookup found.
        plain: what vLLM is expected to take for it.
    """
    if state.reading is not None and plain is not None:
        said = {"why": FromDisk.of(plain, state.reading).why, "left_on_disk": state.left_on_disk}
        return nothing_reused(Left.SLOW_DISK) | said
    return nothing_reused(_reason(state.report))


def _reason(report: Report) -> Left:
    if report.damaged or report.unreadable or report.timed_out:
        return Left.FAILED
    if report.prediction is not None and report.prediction.taken is None:
        return Left.BOUND
    return Left.ALL_RECOMPUTED if report.recomputed else Left.MISSED


def shown(report: Report) -> dict[str, Any]:
    """A report as a response has it."""
    said = report.as_dict()
    return {name: said[name] for name in _SHOWN}
