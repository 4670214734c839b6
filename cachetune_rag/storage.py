"""The engine's store: opened for the device that the model is on."""

from __future__ import annotations

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
        ConfigError: options for a store that is open already, or a device tier for a model on the CPU.
    """
    if isinstance(store, ChunkStore):
        if options:
            raise ConfigError(f"{', '.join(options)} belong to the store, which is open already: set them there.")
        return store
    budget = options.get("device_budget", 0)
    if parse_bytes(budget, "device_budget") and device.type == "cpu":
        raise ConfigError(
            f"device_budget is {budget!r}, but the model is on the CPU, whose memory is the host tier's: leave it out and "
            "set host_budget, or load the model on a GPU."
        )
    return ChunkStore(None if store is None else Path(store), **{"device": device, **options})
