"""The engine's store: opened for the device that the model is on."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from cachetune_rag.errors import ConfigError
from cachetune_rag.options import STORE_NAMES, StoreOptions, check_names
from cachetune_store import ChunkStore
from cachetune_store.printing import shown
from cachetune_store.units import parse_bytes


def open_store(
    store: str | os.PathLike[str] | ChunkStore | None, device: torch.device, options: StoreOptions
) -> ChunkStore:
    """The store that an engine was given, or one with these options of `ChunkStore`, its device tier beside the model.

    Raises:
        ConfigError: options for a store that is open already, that it doesn't have, or that are out of range; or a device tier
            for a model on the CPU.
        StoreError: the folder can't be used.
    """
    check_names(options, STORE_NAMES, "CacheTune")
    check_not_open(store, options)
    if isinstance(store, ChunkStore):
        return store
    budget = options.get("device_budget", 0)
    try:
        if parse_bytes(budget, "device_budget") and device.type == "cpu":
            raise ConfigError(
                f"device_budget is {shown(budget)}, but the model is on the CPU, whose memory is the host tier's: leave it out "
                "and set host_budget, or load the model on a GPU."
            )
        given: StoreOptions = {"device": device, **options}
        return ChunkStore(store, **given)
    except ValueError as error:
        raise ConfigError(f"{error}.") from error


def check_not_open(store: str | os.PathLike[str] | ChunkStore | None, names: Iterable[str]) -> None:
    """Refuse options (by name) for a store that is open already.

    Raises:
        ConfigError: names them.
    """
    if isinstance(store, ChunkStore) and (given := [name for name in names if name in STORE_NAMES]):
        raise ConfigError(f"{', '.join(given)} belong to the store, which is open already: set them there.")
