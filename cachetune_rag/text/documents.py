"""Documents, as a user indexes them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cachetune_rag.checking.arguments import is_iterable
from cachetune_rag.errors import ConfigError
from cachetune_store.printing import shown

_CHUNKS = "use a list of strings, one a retrieved passage."


@dataclass(frozen=True)
class Document:
    """A document: its id, and the texts of its chunks exactly as prompts will show them.

    Attributes:
        id: its name in the store. Indexing another document with the same id replaces this one.
        chunks: texts of its chunks, in order. Any iterable can be given; it is kept as a tuple, so a generator is consumed.
    """

    id: str
    chunks: Sequence[str]

    def __post_init__(self) -> None:
        check_id(self.id)
        if isinstance(self.chunks, str | Mapping) or not is_iterable(self.chunks):
            raise ConfigError(f"document {shown(self.id)}: chunks is {shown(self.chunks)}: {_CHUNKS}")
        chunks = tuple(self.chunks)
        for i, chunk in enumerate(chunks):
            if not isinstance(chunk, str):
                raise ConfigError(
                    f"document {shown(self.id)}: chunks[{i}] is {shown(chunk)}, a {type(chunk).__name__}: {_CHUNKS}"
                )
        object.__setattr__(self, "chunks", chunks)

    @classmethod
    def of(cls, item: Document | str) -> Document:
        """The document itself, or, for a string, a document of one chunk that is named by a hash of the text."""
        if isinstance(item, Document):
            return item
        if isinstance(item, str):
            return cls("text-" + hashlib.sha256(item.encode("utf-8", "surrogatepass")).hexdigest()[:32], [item])
        raise ConfigError(f"document is a {type(item).__name__}: use a Document or a string.")


def check_id(given: object) -> str:
    """Return `given` if it can be a document's id.

    Raises:
        ConfigError: it can't.
    """
    if not isinstance(given, str) or not given:
        raise ConfigError(f"document id is {shown(given)}: use a non-empty string.")
    return given
