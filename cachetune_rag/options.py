"""Names and types of the keyword arguments that are handed on, for editors and type checkers.

The arguments themselves are documented where they are used: `ChunkStore` and `CacheTune`. A test compares both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import torch

from cachetune_rag.checking.nearest import hint
from cachetune_rag.errors import ConfigError
from cachetune_store.printing import shown


class _Shared(TypedDict, total=False):
    codec: str
    host_budget: int | str
    disk_budget: int | str
    device_budget: int | str
    read_memory: int | str | None
    pin_memory: bool | None
    direct_io: bool | None


class StoreOptions(_Shared, total=False):
    """Arguments of `ChunkStore` but its path."""

    device: str | torch.device | None


class EngineOptions(_Shared, total=False):
    """Arguments of `CacheTune` but its model, tokenizer and store, and but the store's device, which is the model's."""

    prompt_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    chunk_separator: str
    lead_in: Sequence[int] | Sequence[Sequence[int]] | str
    tenant: str
    batch_tokens: int | None
    cuda_kernels: bool
    fidelity_sample: float
    read_timeout: float | None


STORE_NAMES = tuple(StoreOptions.__annotations__)
ENGINE_NAMES = tuple(EngineOptions.__annotations__)


def check_names(options: Mapping[str, Any], known: Iterable[str], whose: str) -> None:
    """Refuse an option that isn't known.

    Args:
        options: what was given.
        known: all names that there are.
        whose: what they belong to, for the message.

    Raises:
        ConfigError: names the option, and the nearest one that there is, or all of the store's.
    """
    names = list(known)
    for name in options:
        if name not in names:
            advice = hint(name, names, f"the store has {', '.join(STORE_NAMES)}.")
            raise ConfigError(f"{shown(name)} is no argument of {whose}, nor of its store: {advice}")
