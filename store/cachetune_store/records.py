"""What the index's records look like. A checksum only shows that a record is unchanged, not that the store wrote it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import IndexDamagedError
from .printing import shown

__all__ = ["checked"]


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) is int


def _is_time(value: Any) -> bool:
    return type(value) in (int, float)


def _is_text(value: Any) -> bool:
    return type(value) is str


def _are_texts(value: Any) -> bool:
    return type(value) is list and all(map(_is_text, value))


_FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "chunk": {"size": _is_count, "used": _is_time, "tokens": _is_count},
    "text": {"text": _is_text, "tokens": _is_count, "namespace": _is_text},
    "doc": {"id": _is_text, "tenant": _is_text, "chunks": _are_texts},
    "remote": {"object": _is_text, "size": _is_count, "head": _is_count, "tokens": _is_count},
    "outbox": {"op": _is_text},
    "catalogue": {"id": _is_text, "position": _is_count, "chunks": _is_number, "bytes": _is_number, "writer": _is_text},
    # Counts may be wrong, even below 0, until they are counted anew.
    "total": dict.fromkeys(("bytes", "chunks", "stored"), _is_number),
}
_WHOLE: dict[str, Callable[[Any], bool]] = {
    "ref": _is_count,
    "texts": _is_count,
    "meta": _is_text,
    "waiting": _are_texts,
}


def checked(name: str, record: Any) -> Any:
    """Return the record if the store could have written it.

    Raises:
        IndexDamagedError: the store never writes such a record under such a name.
    """
    kind = name.partition("/")[0]
    if (fields := _FIELDS.get(kind)) is not None:
        sound = type(record) is dict and all(field in record and fits(record[field]) for field, fits in fields.items())
    else:
        sound = kind not in _WHOLE or _WHOLE[kind](record)
    if not sound:
        raise IndexDamagedError(f"the index holds {shown(record)} under {shown(name)}, which the store never writes")
    return record
