"""What every kind of file has in common: who reads it, what comes out, and how a refusal is worded."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar

from cachetune_rag.checking.escaping import visible_line
from cachetune_rag.errors import CacheTuneError

MOST_BYTES = 256 << 20
"""Most bytes that are held at once: of a text, a web page, a table, or a line of JSON. Larger ones are refused by name."""


class CorpusError(CacheTuneError):
    """A file or line can't be read as documents; the message names it, what is allowed and what to do."""


@dataclass(frozen=True)
class SourceDocument:
    """A document as read; exactly one of `text`, `passages` and `chunks` is set.

    Attributes:
        id: the document's.
        text: still to be split.
        chunks: as the author cut them.
        size: what it takes in its file, in bytes.
        where: names that place for messages.
        passages: kept apart, but each still to be split where it is too long.
    """

    id: str
    text: str | None
    chunks: tuple[str, ...] | None
    size: int
    where: str
    passages: tuple[str, ...] | None = None

    @property
    def empty(self) -> bool:
        """No text but white space."""
        return not any(part.strip() for part in (self.chunks or self.passages or (self.text or "",)))

    def cut(self, split: Callable[[str], list[str]]) -> list[str]:
        """Its chunks; `split` cuts a text."""
        if self.chunks:
            return list(self.chunks)
        return [chunk for part in self.passages or (self.text or "",) for chunk in split(part)]


class Reader(ABC):
    """Reads one kind of file.

    Attributes:
        what: its name in messages.
        suffixes: endings of its files, in lower case.
        packages: what has to be installed (the extra `files`), as imported.
        own_ids: whether its documents bring their ids with them; otherwise a file is a document, named by its path.
    """

    what: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    packages: ClassVar[tuple[str, ...]] = ()
    own_ids: ClassVar[bool] = False
    whole: ClassVar[bool] = True
    """Whether a file is held in memory at once, so that its size has a limit."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Those of the packages that aren't installed."""
        return tuple(name for name in self.packages if importlib.util.find_spec(name) is None)

    @property
    def needs(self) -> str:
        """What to do about missing packages."""
        return f"reading {self.what} needs {' and '.join(self.missing)}: pip install 'cachetune-rag[files]'"

    @abstractmethod
    def check(self, head: bytes, path: Path) -> None:
        """Refuse, by a file's first bytes, what is clearly of another kind.

        Raises:
            CorpusError: says what it is.
        """

    @abstractmethod
    def read(self, stream: BinaryIO, name: str, path: Path) -> Iterator[SourceDocument]:
        """The file's documents.

        Args:
            stream: the file, from its beginning.
            name: id of the document, if a file is one.
            path: for messages.

        Raises:
            CorpusError: it can't be read on; says where and why.
        """


def read_whole(stream: BinaryIO, path: Path) -> bytes:
    """All bytes of a file.

    Raises:
        CorpusError: they are more than `MOST_BYTES`.
    """
    data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise CorpusError(too_large(path))
    return data


def too_large(path: Path) -> str:
    """The message about a file of more than `MOST_BYTES`."""
    return (
        f"{visible_line(path)} is larger than {MOST_BYTES >> 20} MiB, the most that is read as one document: cut it into "
        "several files, or make it JSONL."
    )


def clean(text: str) -> str:
    """Text out of a page, without what is no Unicode: NUL, and halves of surrogate pairs (whole pairs are joined)."""
    joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return joined.replace("\0", "")
