"""The log of changes by which machines agree on what a remote place holds, and its snapshots.

The log is one sequence of objects, `changes/000000000001`, `changes/000000000002` and so on. A writer adds the next one by a put that
fails if there is an object of that name, so no two writers ever write the same one, and all machines see the same changes in the
same order. Now and then a writer adds up all changes so far in a snapshot, and deletes old changes: what they said about
documents that were removed is gone then.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import RemoteError, StoreError
from ..keys import ChunkKey
from ..seals import Seal
from .objects import Objects

__all__ = [
    "Change",
    "DamagedChangeError",
    "Op",
    "State",
    "change_name",
    "decode",
    "encode",
    "latest_snapshot",
    "object_name",
    "read_change",
    "write_snapshot",
    "written_at",
]

FORMAT, VERSION = "cachetune-changes", 1
MOST_BYTES = 64 << 20
"""Longest change or part of a snapshot, packed, that is read."""
_MOST_UNPACKED = 512 << 20
_OPS_A_PART = 20_000
"""Ops of one object of a snapshot."""
_SNAPSHOT = re.compile(r"snapshots/(\d{12})-(\d{5})-(\d{5})")

_log = logging.getLogger(__name__)

Op = dict[str, Any]
"""One change: {"op": KIND, ...}. Kinds and their other fields: "chunk" (key, object, size, head, tokens, text, namespace): a chunk was
written. "free" (key, object): it was removed. "put" (tenant, id, chunks): a document has these chunks now. "add" (the same): it has
them too. "del" (tenant, id): it was removed. "erase" (tenant, secret): the tenant was deleted, and its secrets of this life erased; "" where it has none."""

_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "chunk": {"object": str, "size": int, "head": int, "tokens": int, "text": (str, type(None)), "namespace": str},
    "free": {"object": str},
    "put": {"tenant": str, "id": str, "chunks": list},
    "add": {"tenant": str, "id": str, "chunks": list},
    "del": {"tenant": str, "id": str},
    "erase": {"tenant": str, "secret": str},
}
_OBJECT = re.compile(r"chunks/[0-9a-f]{2}/(?:[0-9a-f]{64}|[0-9a-f]{96})-[0-9a-f]{32}\.safetensors")


class DamagedChangeError(StoreError):
    """A change or a snapshot can't be read."""


@dataclass(frozen=True)
class Change:
    """One object of the log.

    Attributes:
        writer: who wrote it.
        names: by which names that writer knows the ops, so that it recognises its own.
        ops: what changed, in order.
    """

    writer: str
    names: list[str]
    ops: list[Op]


def object_name(chunk: str) -> str:
    """A new name for an object that holds the chunk of this name. It is never given again, so that deleting one never hits another.

    It says when it was made, in thousandths of a second.
    """
    return f"chunks/{chunk[:2]}/{chunk}-{time.time_ns() // 1_000_000:012x}{uuid.uuid4().hex[:20]}.safetensors"


def written_at(name: str) -> float | None:
    """When an object's name was made, in seconds since the epoch; None if it isn't the name of a chunk's object."""
    if not _OBJECT.fullmatch(name):
        return None
    return int(name.rpartition("-")[2][:12], 16) / 1000


def change_name(number: int) -> str:
    """The name of a change's object."""
    return f"changes/{number:012d}"


def encode(change: Change, name: str, seal: Seal) -> bytes:
    """A change as the object of this name holds it."""
    content = {"format": FORMAT, "version": VERSION, "writer": change.writer, "names": change.names, "ops": change.ops}
    packed = gzip.compress(json.dumps(content, separators=(",", ":")).encode(), compresslevel=5, mtime=0)
    return seal.wrap("change", name, packed)


def decode(raw: bytes, name: str, seal: Seal) -> Change:
    """The change in the object of this name.

    Raises:
        DamagedChangeError: it is none.
    """
    try:
        unpacker = zlib.decompressobj(wbits=31)
        packed = seal.unwrap("change", name, raw)
        if packed is None:
            raise ValueError("it was not written with this store's key, or not under this name")
        plain = unpacker.decompress(packed, _MOST_UNPACKED)
        if not unpacker.eof:
            raise ValueError("it ends early, or is too long")
        content = json.loads(plain)
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise ValueError(f"it says {content['format']!r}, version {content['version']!r}")
        ops = [_checked(op, seal) for op in content["ops"]]
        return Change(str(content["writer"]), [str(each) for each in content["names"]], ops)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, zlib.error, StoreError) as error:
        raise DamagedChangeError(f"{name} is no change of this format ({error})") from error


def _checked(op: Any, seal: Seal) -> Op:
    """An op, if it is one that a store writes: names in it become names of objects."""
    kind = op["op"]
    for name, types in _FIELDS[kind].items():
        if not isinstance(op[name], types) or isinstance(op[name], bool):
            raise ValueError(f"{name} is of the wrong kind")
    if kind in ("chunk", "free"):
        chunk = seal.chunk_name(ChunkKey(op["key"]))
        if not _OBJECT.fullmatch(op["object"]) or f"/{chunk}-" not in op["object"]:
            raise ValueError("the object's name is not that of a chunk")
    if kind == "chunk" and not (0 < op["head"] <= op["size"] < 1 << 48 and op["tokens"] > 0):
        raise ValueError("sizes don't fit")
    for digest in op.get("chunks", ()):
        ChunkKey(digest)
    return dict(op)


def read_change(objects: Objects, number: int, seal: Seal) -> Change | None:
    """A change of the log; None if there is none of that number.

    Raises:
        DamagedChangeError: it can't be read.
    """
    raw = objects.get(change_name(number), MOST_BYTES)
    return None if raw is None else decode(raw, change_name(number), seal)


@dataclass
class State:
    """What all changes up to a number come to.

    Attributes:
        number: the last change.
        chunks: the op "chunk" of each chunk that is there.
        documents: chunks by tenant and id.
        erased: the op "erase" of each tenant and life.
    """

    number: int = 0
    chunks: dict[str, Op] = field(default_factory=dict)
    documents: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    erased: dict[tuple[str, str], Op] = field(default_factory=dict)

    def add(self, ops: Iterable[Op]) -> None:
        """Add the ops of the next changes. The first writer of a chunk wins, and the last one of a document."""
        for op in ops:
            kind = op["op"]
            if kind == "chunk":
                self.chunks.setdefault(op["key"], op)
            elif kind == "free":
                if op["key"] in self.chunks and self.chunks[op["key"]]["object"] == op["object"]:
                    del self.chunks[op["key"]]
            elif kind == "put":
                self.documents[op["tenant"], op["id"]] = list(op["chunks"])
            elif kind == "add":
                held = self.documents.setdefault((op["tenant"], op["id"]), [])
                held.extend(dict.fromkeys(digest for digest in op["chunks"] if digest not in set(held)))
            elif kind == "erase":
                self.erased[op["tenant"], op["secret"]] = op
            else:
                self.documents.pop((op["tenant"], op["id"]), None)

    def ops(self) -> Iterator[Op]:
        """Ops that come to this state."""
        yield from self.erased.values()
        yield from self.chunks.values()
        for (tenant, name), chunks in self.documents.items():
            yield {"op": "put", "tenant": tenant, "id": name, "chunks": chunks}


def latest_snapshot(objects: Objects, seal: Seal, above: int = 0) -> State | None:
    """The newest snapshot of which all parts are there and can be read, if it has more than the first `above` changes.

    Where a newer one is damaged, an older one will do, or none: the changes that come after it are still there.

    Raises:
        RemoteError: they are not.
    """
    found: State | None = None
    damage: DamagedChangeError | None = None
    for number, parts in sorted(_snapshots(objects).items(), reverse=True):
        if number <= above:
            break
        raws = [objects.get(name, MOST_BYTES) for name in parts]
        if any(raw is None for raw in raws):
            continue
        state = State(number)
        try:
            for name, raw in zip(parts, raws, strict=True):
                state.add(decode(raw or b"", name, seal).ops)
        except DamagedChangeError as error:
            _log.error("%s: an older snapshot is looked for", error)
            damage = damage or error
            continue
        found = state
        break
    if damage is not None and objects.get(change_name((found.number if found else above) + 1), MOST_BYTES) is None:
        raise RemoteError(
            f"{objects.place}: {damage}, and the changes that it adds up are deleted; restore the object, or delete all that is below this "
            "prefix and precompute again"
        ) from damage
    return found


def _snapshots(objects: Objects) -> dict[int, list[str]]:
    """Names of the parts of each snapshot of which all are there, by the number of its last change."""
    found: dict[int, dict[int, str]] = {}
    whole: dict[int, int] = {}
    for name in objects.names("snapshots/"):
        if match := _SNAPSHOT.fullmatch(name):
            number, part, parts = (int(each) for each in match.groups())
            found.setdefault(number, {})[part] = name
            whole[number] = parts
    return {
        number: [parts[part] for part in sorted(parts)]
        for number, parts in found.items()
        if len(parts) == whole[number]
    }


def write_snapshot(objects: Objects, state: State, writer: str, keep: int, seal: Seal) -> None:
    """Write a snapshot, and delete changes and snapshots that nobody needs any more.

    Args:
        objects: where to.
        state: what it says.
        writer: who writes it.
        keep: changes before the snapshot that stay, for machines that are a bit behind.
        seal: makes the sums of its parts.
    """
    ops = list(state.ops())
    pieces = [ops[start : start + _OPS_A_PART] for start in range(0, len(ops), _OPS_A_PART)] or [[]]
    for part, piece in enumerate(pieces):
        name = f"snapshots/{state.number:012d}-{part:05d}-{len(pieces):05d}"
        objects.put(name, [encode(Change(writer, [], piece), name, seal)], create=True)
    # Machines read the newest one. The one before stays for those that have just found it.
    found = _snapshots(objects)
    older = sorted(number for number in found if number < state.number)
    objects.delete([name for number in older[:-1] for name in found[number]])
    if state.number > keep:
        oldest = change_name(state.number - keep)
        objects.delete([name for name in objects.names("changes/") if name <= oldest])
