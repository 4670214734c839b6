"""The engine's store: opened for the device that the model is on."""

from __future__ import annotations

import difflib
import inspect
import os
from pathlib import Path
from typing import Any

import torch

from cachetune_rag.errors import ConfigError
from cachetune_store import ChunkStore
from cachetune_store.units import parse_bytes


def open_store(
    store: str | os.PathLike[str] | ChunkStore | None, device: torch.device, options: dict[str, Any]
) -> ChunkStore:
    """The store that an engine was given, or one with these options of `ChunkStore`, its device tier beside the model.

    Raises:
        ConfigError: options for a store that is open already, that it doesn't have, or that are out of range; or a device tier
            for a model on the CPU.
        StoreError: the folder can't be used.
    """
    if isinstance(store, ChunkStore):
        if options:
            raise ConfigError(f"{', '.join(options)} belong to the store, which is open already: set them there.")
        return store
    _check_names(options)
    budget = options.get("device_budget", 0)
    try:
        if parse_bytes(budget, "device_budget") and device.type == "cpu":
            raise ConfigError(
                f"device_budget is {budget!r}, but the model is on the CPU, whose memory is the host tier's: leave it out "
                "and set host_budget, or load the model on a GPU."
            )
        return ChunkStore(None if store is None else Path(store), **{"device": device, **options})
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{error}.") from error


def _check_names(options: dict[str, Any]) -> None:
    """Refuse an option that neither the engine nor the store has."""
    known = [name for name in inspect.signature(ChunkStore).parameters if name != "path"]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the store has {', '.join(known)}."
            raise ConfigError(f"{name!r} is no argument of CacheTune, nor of its store: {hint}")
