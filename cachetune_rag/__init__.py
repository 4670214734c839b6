"""cachetune-rag: reuse the KV cache of retrieved chunks and recompute only what matters."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachetune_rag.answer import Answer, AnswerStream
    from cachetune_rag.assembly import PrefillState
    from cachetune_rag.calibration import Calibration
    from cachetune_rag.deadline import StoreTimeoutError
    from cachetune_rag.documents import Document
    from cachetune_rag.engine import CacheTune
    from cachetune_rag.errors import (
        CacheTuneError,
        ConfigError,
        EngineClosedError,
        ForkedError,
        ModelChangedError,
        ModelLoadError,
        NonFiniteLogitsError,
        PromptError,
        PromptTooLongError,
        UnsupportedModelError,
    )
    from cachetune_rag.prompt import Chunk, Prompt, PromptBuilder, Text
    from cachetune_rag.report import PrecomputeSummary, Report
    from cachetune_rag.splitting import Splitter
    from cachetune_rag.tuning import TuningResult
    from cachetune_store import (
        BudgetError,
        DamagedChunkError,
        DocumentInfo,
        NonFiniteError,
        StoreArgumentError,
        StoreClosedError,
        StoreError,
        StoreForkedError,
        StoreFullError,
        StoreLockedError,
        StorePathError,
        StoreReadOnlyError,
        StoreVersionError,
        UnknownDocumentError,
    )

__version__ = "0.1.0"

# Imported when first used: torch and transformers take seconds, and `cachetune --help` needs neither.
_HOMES = {
    "answer": ("Answer", "AnswerStream"),
    "assembly": ("PrefillState",),
    "calibration": ("Calibration",),
    "deadline": ("StoreTimeoutError",),
    "documents": ("Document",),
    "engine": ("CacheTune",),
    "errors": (
        "CacheTuneError",
        "ConfigError",
        "EngineClosedError",
        "ForkedError",
        "ModelChangedError",
        "ModelLoadError",
        "NonFiniteLogitsError",
        "PromptError",
        "PromptTooLongError",
        "UnsupportedModelError",
    ),
    "prompt": ("Chunk", "Prompt", "PromptBuilder", "Text"),
    "report": ("PrecomputeSummary", "Report"),
    "splitting": ("Splitter",),
    "tuning": ("TuningResult",),
}
_STORES = (
    "BudgetError",
    "DamagedChunkError",
    "DocumentInfo",
    "NonFiniteError",
    "StoreArgumentError",
    "StoreClosedError",
    "StoreError",
    "StoreForkedError",
    "StoreFullError",
    "StoreLockedError",
    "StorePathError",
    "StoreReadOnlyError",
    "StoreVersionError",
    "UnknownDocumentError",
)
"""Of the store, what its users meet."""

__all__ = [
    "Answer",
    "AnswerStream",
    "BudgetError",
    "CacheTune",
    "CacheTuneError",
    "Calibration",
    "Chunk",
    "ConfigError",
    "DamagedChunkError",
    "Document",
    "DocumentInfo",
    "EngineClosedError",
    "ForkedError",
    "ModelChangedError",
    "ModelLoadError",
    "NonFiniteError",
    "NonFiniteLogitsError",
    "PrecomputeSummary",
    "PrefillState",
    "Prompt",
    "PromptBuilder",
    "PromptError",
    "PromptTooLongError",
    "Report",
    "Splitter",
    "StoreArgumentError",
    "StoreClosedError",
    "StoreError",
    "StoreForkedError",
    "StoreFullError",
    "StoreLockedError",
    "StorePathError",
    "StoreReadOnlyError",
    "StoreTimeoutError",
    "StoreVersionError",
    "Text",
    "TuningResult",
    "UnknownDocumentError",
    "UnsupportedModelError",
]


def __getattr__(name: str) -> Any:
    if name in _STORES:
        return getattr(import_module("cachetune_store"), name)
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
