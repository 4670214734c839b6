"""What a store was filled with. Asked where a server starts, so that nobody wonders later why no chunk is found."""

from __future__ import annotations

from cachetune_rag.chunks.differences import what_differs
from cachetune_store import ChunkStore, Namespace
from cachetune_store.paths import is_store
from cachetune_store.remote.places import is_remote
from cachetune_store.units import NO_LIMIT
from cachetune_vllm.settings import ServerSettings

SAMPLE = 64
"""Documents that are looked at; they lie evenly among all."""


def sampled_namespaces(store: ChunkStore, tenant: str) -> list[Namespace]:
    """The different namespaces of a tenant's stored chunks, by a sample of its documents; empty if none of these is stored."""
    documents = store.documents(tenant=tenant)
    found: dict[Namespace, None] = {}
    for document in documents[:: max(1, len(documents) // SAMPLE)]:
        for key in document.chunks:
            reader = store.open(key)
            if reader is not None:
                with reader:
                    found[reader.head.namespace] = None
                break
    return list(found)


def stored_dtype(settings: ServerSettings) -> str | None:
    """The number format of the stored chunks of a server's tenant; None if there are none, or they have several.

    Raises:
        StoreError: there is a store, and it can't be used.
    """
    if settings.remote is None and not is_remote(settings.store) and not is_store(settings.store):
        return None
    with ChunkStore(**settings.place, host_budget=0, disk_budget=NO_LIMIT) as store:
        dtypes = {namespace.dtype for namespace in sampled_namespaces(store, settings.tenant)}
    return dtypes.pop() if len(dtypes) == 1 else None


def why_unusable(store: ChunkStore, wanted: Namespace) -> str:
    """For a server that knows no chunk of its tenant: why, and what to do."""
    sample = sampled_namespaces(store, wanted.tenant)
    if not sample:
        whose = " for its tenant" if wanted.tenant else ""
        return (
            f"nothing is stored{whose} yet. `cachetune precompute` fills the store, also while the server runs; it needs the same "
            "--model, --store and --tenant."
        )
    stored = min(sample, key=lambda each: _ORDER.index(what_differs(each, wanted)))
    return {
        "model": "its chunks were computed with another model, or other weights of it: serve the model that "
        "`cachetune precompute` was given, or run it again with this one.",
        "tokenizer": "its chunks were computed with another tokenizer: serve the model that `cachetune precompute` was given, or run "
        "it again with this one.",
        "dtype": f"its chunks were computed in {stored.dtype}, and this server computes in {wanted.dtype}: start it with --dtype "
        f"{stored.dtype}, or run `cachetune precompute` again with --dtype {wanted.dtype}.",
        "lead-ins": "its chunks were computed behind other lead-ins: give the server the `lead_in` that `cachetune precompute` had "
        "(docs/options.md), or run it again.",
    }[what_differs(stored, wanted)]


_ORDER = ("dtype", "lead-ins", "tokenizer", "model")
"""What differs, the easiest to mend first."""
