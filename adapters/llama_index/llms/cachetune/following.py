"""Updates the KV store together with an index or docstore, by wrapping the methods of these."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from llama_index.core.schema import BaseNode

from cachetune_rag.concurrency.async_calls import call_in_thread
from llama_index.llms.cachetune.deletions import Deletions, Freeing, of_update, update
from llama_index.llms.cachetune.traces import TRACES


class Followed(Freeing, Protocol):
    """An object that updates the KV store: a `KVPrecompute`."""

    def insert(self, nodes: Sequence[BaseNode]) -> object:
        """Compute further nodes of documents."""


def deletions() -> Deletions | None:
    """The deletions of the running update or ingestion run, which are handled at its end; None if there is none."""
    return of_update() or TRACES.current().ingestion


def follow(owner: Followed, target: Any) -> None:
    """Let `owner` know what an index or a docstore inserts, updates and deletes.

    Raises:
        TypeError: `target` has no method that deletes documents.
    """
    makers: dict[str, Callable[..., Any]] = {
        "delete_ref_doc": _after_deletion,
        "delete_document": _after_deletion,
        "delete_nodes": _after_deletion,
        "insert_nodes": _after_insertion,
        "update_ref_doc": _as_update,
    }
    if not any(hasattr(target, name) for name in ("delete_ref_doc", "delete_document")):
        raise TypeError(f"{type(target).__name__} deletes no documents: give an index or a docstore.")
    for name, make in makers.items():
        for real in (name, f"a{name}"):
            if hasattr(target, real):
                setattr(target, real, make(owner, getattr(target, real), real.startswith("a")))


def _after_deletion(owner: Followed, delete: Callable[..., Any], is_async: bool) -> Callable[..., Any]:
    """`delete`, followed by freeing the KV. Ids are those of documents, or of nodes without a document."""

    def deleted(ids: str | Sequence[str]) -> None:
        waiting = deletions()
        for id in [ids] if isinstance(ids, str) else ids:
            if waiting is None:
                owner.delete_ref_doc(id)
            else:
                waiting.add(owner, id)

    return _then(delete, deleted, is_async)


def _after_insertion(owner: Followed, insert: Callable[..., Any], is_async: bool) -> Callable[..., Any]:
    return _then(insert, lambda nodes: owner.insert(list(nodes)), is_async)


def _then(call: Callable[..., Any], told: Callable[[Any], object], is_async: bool) -> Callable[..., Any]:
    """A function that calls `call`, and then `told` with the first argument."""

    @functools.wraps(call)
    def calling(first: Any, *args: Any, **kwargs: Any) -> Any:
        result = call(first, *args, **kwargs)
        told(first)
        return result

    @functools.wraps(call)
    async def acalling(first: Any, *args: Any, **kwargs: Any) -> Any:
        result = await call(first, *args, **kwargs)
        await call_in_thread(told, first)
        return result

    return acalling if is_async else calling


def _as_update(owner: Followed, call: Callable[..., Any], is_async: bool) -> Callable[..., Any]:
    @functools.wraps(call)
    def updating(*args: Any, **kwargs: Any) -> Any:
        with update():
            return call(*args, **kwargs)

    @functools.wraps(call)
    async def aupdating(*args: Any, **kwargs: Any) -> Any:
        with update():
            return await call(*args, **kwargs)

    return aupdating if is_async else updating
