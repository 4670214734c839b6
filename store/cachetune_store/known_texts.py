"""Reading the texts of chunks from the index. `texts.py` writes them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .errors import ErasedChunkError, IndexDamagedError, StoreKeyError
from .index import Index
from .keys import ChunkKey
from .repair import Repair
from .seals import Seal
from .texts import texts_revision

__all__ = ["KnownTexts"]


class KnownTexts:
    """The texts that a store knows.

    Args:
        index: where their records are.
        repair: mends the index, should it turn out to be damaged.
        seal: gives what reads the texts in records. It is called for each text: how the texts of a shared place are written is only known
            once the place has answered.
    """

    def __init__(self, index: Index, repair: Repair, seal: Callable[[], Seal]) -> None:
        self._index, self._repair, self._seal = index, repair, seal

    def every(self, namespace: str | None) -> Iterator[tuple[ChunkKey, str, int]]:
        """Key, text and token count of every chunk that has a text; only those of a namespace, if its digest is given."""
        last = ""
        while True:
            try:
                for name, record in self._index.items("text/"):
                    place = self._index.place(name)
                    if place > last and (namespace is None or record["namespace"] == namespace):
                        key = ChunkKey(name.removeprefix("text/"))
                        text = self._text(key, record)
                        if text is not None:
                            yield key, text, record["tokens"]
                    last = max(last, place)
                return
            except IndexDamagedError as error:
                # The loop goes on behind the last record that was looked at.
                self._repair.heal(error)

    def of(self, keys: Sequence[ChunkKey], namespace: str | None) -> Iterator[tuple[ChunkKey, str, int]]:
        """As `every`, of these chunks alone, in their order."""
        for key in keys:
            record = self._record(key)
            if record is not None and (namespace is None or record["namespace"] == namespace):
                text = self._text(key, record)
                if text is not None:
                    yield key, text, record["tokens"]

    def keys(self) -> list[ChunkKey]:
        """The chunks that have a text. No text is read."""
        names = self._repair.healed(lambda: list(self._index.names("text/")))
        return [ChunkKey(name.removeprefix("text/")) for name in names]

    def revision(self) -> int:
        """A number that changes whenever a text comes or goes."""
        return self._repair.healed(lambda: texts_revision(self._index))

    def _record(self, key: ChunkKey) -> Any:
        return self._repair.healed(lambda: self._index.get(f"text/{key}"))

    def _text(self, key: ChunkKey, record: Any) -> str | None:
        """The text in a record; None if nobody can read it any more, or the tenant's secret can't be had now."""
        with contextlib.suppress(ErasedChunkError, StoreKeyError):
            return self._seal().reveal_text(key, record["text"])
        return None
