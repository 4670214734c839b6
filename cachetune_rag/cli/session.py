"""Opening a store and an engine for a command. Whatever can be refused is refused before the model is loaded."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cachetune_rag.checking.escaping import visible_line
from cachetune_rag.chunks.differences import what_differs
from cachetune_rag.cli.console import UsageError, note, size
from cachetune_rag.cli.interrupts import instant_interrupt
from cachetune_store.paths import is_store, other_files
from cachetune_store.printing import shown
from cachetune_store.units import NO_LIMIT

if TYPE_CHECKING:
    import torch

    from cachetune_rag.engine import CacheTune
    from cachetune_store import ChunkStore, Namespace


@dataclass(frozen=True)
class Loading:
    """The options of a command that say which model is loaded, how, and for which tenant."""

    model: str
    gguf_file: str | None
    dtype: str
    device: str
    tenant: str
    lead_in: str = "auto"


@contextmanager
def opened(
    store: ChunkStore, loading: Loading, *, documents: Iterable[str] = (), saves: str | None = None
) -> Iterator[CacheTune]:
    """An engine on an open store, for a command that asks or measures. Both are closed with the context.

    What the engine adds to the store is encoded as the model's stored chunks are.

    Args:
        store: an open store.
        loading: which model.
        documents: ids that the tenant must have in the store.
        saves: what the command will save in the store, such as "calibrated"; None: nothing.

    Raises:
        UsageError: a document isn't there, the model is a path that doesn't exist, or the store was made with another model.
        CacheTuneError: nothing can be saved in the store, or the model can't be loaded.
    """
    with store:
        if saves is not None:
            with instant_interrupt():
                from cachetune_rag.measuring.profiles import check_savable

            check_savable(store, saves)
        check_known(documents, store, loading.tenant)
        with load_engine(loading, store) as engine:
            match_codec(engine, store)
            yield engine


def open_existing(
    path: Path,
    host_budget: str = "0",
    *,
    device_budget: str = "0",
    device: str = "auto",
    remote: str | None = None,
    store_key: str | None = None,
) -> ChunkStore:
    """Open the store at `path` without evicting anything, and keep at most `host_budget` of it in memory.

    Args:
        path: the store's folder.
        host_budget, device_budget: as the user wrote them.
        device: the model's device, as the user wrote it.
        remote: URL of the place that machines share; None: none. With one, the folder need not be there yet.
        store_key: the store's key, as the user gave it.

    Raises:
        UsageError: there is no store, a budget is not a number of bytes, or a device budget is given for the CPU.
        ConfigError: the device doesn't exist.
        StoreError: it can't be used.
    """
    if remote is not None:
        _check_empty(path)
    elif not is_store(path):
        raise UsageError(
            f"no store at {path}: check --store, or make one with 'cachetune precompute PATH --model M --store {path}'."
        )
    on_device = parse_budget(device_budget, "--device-budget")
    host = parse_budget(host_budget, "--host-budget")
    return _open(
        path,
        "exact",
        host,
        NO_LIMIT,
        on_device,
        _device_of_tier(device_budget, device) if on_device else None,
        remote=remote,
        store_key=store_key,
    )


def _check_empty(path: Path) -> None:
    """Refuse a folder that is no store and holds other files.

    Raises:
        UsageError: names one of them.
    """
    if not is_store(path) and (others := other_files(path)):
        raise UsageError(
            f"{visible_line(path)} is no store, but holds {shown(others[0])}: give --store a new or empty folder."
        )


def open_for_writing(
    path: Path,
    *,
    codec: str,
    host_budget: str,
    disk_budget: str,
    remote: str | None = None,
    remote_codec: str | None = None,
    store_key: str | None = None,
    encrypt: bool = False,
) -> ChunkStore:
    """Open the store at `path`, and make it if it is missing.

    Raises:
        UsageError: the folder has other files, a budget is not a number of bytes, or the store is larger already.
        StoreError: it can't be used.
    """
    host, disk = parse_budget(host_budget, "--host-budget"), parse_budget(disk_budget, "--disk-budget")
    _check_empty(path)
    store = _open(
        path, codec, host, disk, remote=remote, remote_codec=remote_codec, store_key=store_key, encrypt=encrypt
    )
    try:
        store.check_writable()  # before a model is loaded
    except BaseException:
        store.close()
        raise
    tier = store.stats().disk
    if tier is not None and tier.bytes > disk:
        store.close()
        raise UsageError(
            f"the store {path} holds {size(tier.bytes)}, more than --disk-budget {disk_budget}: give a larger budget, or "
            "remove documents first (cachetune remove)."
        )
    return store


def parse_budget(value: str, option: str) -> int:
    """Bytes of a budget such as "4GiB".

    Raises:
        UsageError: names the option.
    """
    with instant_interrupt():
        from cachetune_store.units import parse_bytes

    try:
        return parse_bytes(value, option)
    except ValueError as error:
        raise UsageError(f"{error}.") from None


def check_known(wanted: Iterable[str], store: ChunkStore, tenant: str) -> None:
    """Refuse document ids that the tenant doesn't have in the store.

    Raises:
        UsageError: names the id, and those like it.
    """
    if not (wanted := list(wanted)):
        return
    known = [info.id for info in store.documents(tenant=tenant)]
    whose = f" of tenant {shown(tenant)}" if tenant else ""
    for name in wanted:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
            listing = "'cachetune stats --documents" + (" --tenant ...'" if tenant else "'")
            raise UsageError(f"no document {shown(name)}{whose} in the store. {hint}{listing} lists them.")


def load_engine(loading: Loading, store: ChunkStore, *, any_store: bool = False) -> CacheTune:
    """An engine on an open store; a line on stderr says that the model loads.

    Args:
        loading: which model.
        store: an open store.
        any_store: whether the store may hold nothing but chunks of other models.

    Raises:
        UsageError: the model is a path that doesn't exist, or the store was made with another model.
    """
    model = loading.model
    if model.startswith(("/", "./", "../", "~")) and not Path(model).expanduser().is_dir():
        raise UsageError(f"model {model} is no folder: check --model, or give a hub id such as org/name.")
    note(f"Loading {visible_line(model)} ...")
    _quieten_transformers()
    with instant_interrupt():
        from cachetune_rag.engine import CacheTune

        engine = CacheTune.from_pretrained(
            str(Path(model).expanduser()) if model.startswith("~") else model,
            store,
            gguf_file=loading.gguf_file,
            dtype=loading.dtype,
            device=loading.device,
            lead_in=loading.lead_in,
            tenant=loading.tenant,
        )
    try:
        if not any_store:
            check_match(engine, store)
    except BaseException:
        engine.close()
        raise
    return engine


def check_match(engine: CacheTune, store: ChunkStore) -> None:
    """Refuse a store that has documents of this engine's tenant, but no chunk that the engine can use.

    Raises:
        UsageError: says what differs.
    """
    if any(next(store.texts(namespace=known), None) is not None for known in engine.lead_ins.namespaces):
        return
    # Only the tenant's own documents are looked at. Those of others say nothing about this run, and are confidential.
    documents = store.documents(tenant=engine.namespace.tenant)
    for key in dict.fromkeys(key for document in documents for key in document.chunks):
        found = store.open(key)
        if found is not None:
            with found:
                raise UsageError(mismatch(found.head.namespace, engine.namespace, store.path))


def same_but_lead_ins(stored: Namespace, wanted: Namespace) -> bool:
    """Whether a stored text can be a passage of this engine. If its lead-ins differ, it is a miss, but can be computed."""
    return replace(stored, lead_ins=wanted.lead_ins) == wanted


def match_codec(engine: CacheTune, store: ChunkStore) -> None:
    """Encode new chunks as the model's stored chunks are encoded, so that ratios that are saved for this codec are used."""
    for namespace in engine.lead_ins.namespaces:
        for key, *_ in store.texts(namespace=namespace):
            found = store.open(key)
            if found is not None:
                with found:
                    store.codec = found.layout.codec
                return


def mismatch(stored: Namespace, wanted: Namespace, path: Path | None) -> str:
    """Says why an engine can't use chunks of another one."""
    what = {
        "model": "another model (or other weights of it)",
        "tokenizer": "another tokenizer",
        "dtype": f"dtype {stored.dtype}, and this run has {wanted.dtype}",
        "lead-ins": "other lead-ins",
    }[what_differs(stored, wanted)]
    return (
        f"the store {path} does not match this run: it was made with {what}. Use the same --model, --dtype and --lead-in "
        "as then, or another --store."
    )


def _device_of_tier(budget: str, name: str) -> torch.device:
    with instant_interrupt():
        from cachetune_rag.model.loading import resolve_device

    device = resolve_device(name)
    if device.type == "cpu":
        raise UsageError(
            f"--device-budget is {budget}, but the model runs on the CPU, whose memory is --host-budget: leave it out, or use "
            "--device cuda where there is a GPU."
        )
    return device


def _open(
    path: Path,
    codec: str,
    host_budget: int,
    disk_budget: int,
    device_budget: int = 0,
    device: torch.device | None = None,
    *,
    remote: str | None = None,
    remote_codec: str | None = None,
    store_key: str | None = None,
    encrypt: bool = False,
) -> ChunkStore:
    with instant_interrupt():
        from cachetune_store import ChunkStore

    return ChunkStore(
        path,
        codec=codec,
        host_budget=host_budget,
        disk_budget=disk_budget,
        device_budget=device_budget,
        device=device,
        remote=remote,
        remote_codec=remote_codec,
        store_key=store_key,
        encrypt=encrypt or None,
    )


def _quieten_transformers() -> None:
    """Keep transformers from printing advice, and from drawing progress bars if there is no terminal. Call it before the import."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
