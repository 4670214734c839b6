"""cachetune-rag: reuse the KV cache of retrieved chunks and recompute only what matters."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachetune_rag.answering.answer import Answer
    from cachetune_rag.answering.stream import AnswerStream
    from cachetune_rag.concurrency.deadline import StoreTimeoutError
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
    from cachetune_rag.measuring.calibration.result import Calibration
    from cachetune_rag.measuring.tuning import TuningResult
    from cachetune_rag.report import PrecomputeSummary, Report
    from cachetune_rag.reuse.state import PrefillState
    from cachetune_rag.text.documents import Document
    from cachetune_rag.text.prompts.prompt import Chunk, Prompt, PromptBuilder, Text
    from cachetune_rag.text.splitting import Splitter
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
        StoreKeyError,
        StoreLockedError,
        StorePathError,
        StoreReadOnlyError,
        StoreVersionError,
        UnknownDocumentError,
    )

__version__ = "0.1.0"

# Imported when first used: torch and transformers take seconds, and `cachetune --help` needs neither.
_HOMES = {
    "answering.answer": ("Answer",),
    "answering.stream": ("AnswerStream",),
    "reuse.state": ("PrefillState",),
    "measuring.calibration.result": ("Calibration",),
    "concurrency.deadline": ("StoreTimeoutError",),
    "text.documents": ("Document",),
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
    "text.prompts.prompt": ("Chunk", "Prompt", "PromptBuilder", "Text"),
    "report": ("PrecomputeSummary", "Report"),
    "text.splitting": ("Splitter",),
    "measuring.tuning": ("TuningResult",),
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
    "StoreKeyError",
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
    "StoreKeyError",
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


_MOVED = {
    "answer": "answering.answer",
    "assembly": "reuse.prefill",
    "calibration": "measuring.calibration.result",
    "commands": "cli",
    "commands.lexical": "cli.lexical",
    "config": "reuse.config",
    "deadline": "concurrency.deadline",
    "documents": "text.documents",
    "loading": "model.loading",
    "precompute": "chunks.precompute",
    "prompt": "text.prompts.prompt",
    "recognition": "text.recognising.chunk_recognizer",
    "splitting": "text.splitting",
    "tuning": "measuring.tuning",
}
"""Modules that have moved since 0.1.0 and may stand in users' imports and pickles: old path -> new path."""


class _MovedModules(MetaPathFinder, Loader):
    """Lets moved modules be imported by their old paths until 1.0, with a warning. Files that only import others would look like places to work in."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != __name__ or name not in _MOVED:
            return None
        return ModuleSpec(fullname, self, is_package=name == "commands")

    def exec_module(self, module: ModuleType) -> None:
        new = f"{__name__}.{_MOVED[module.__name__.partition('.')[2]]}"
        warnings.warn(
            f"{module.__name__} is {new} now; the old path goes with 1.0: change the import.",
            DeprecationWarning,
            stacklevel=2,
        )
        home = import_module(new)
        vars(module)["__getattr__"] = lambda name: getattr(home, name)


sys.meta_path.append(_MovedModules())
