"""What all readers have in common: the base class, the documents that they return, and their error."""

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
"""Most bytes of a text, a web page, a table, or a line of JSON, which are held in memory. Larger ones are refused."""


class CorpusError(CacheTuneError):
    """A file or line can't be read as documents. The message names it and says what is allowed and what to do."""


@dataclass(frozen=True)
class SourceDocument:
    """A document as it was read. Exactly one of `text`, `passages` and `chunks` is set.

    Attributes:
        id: the document's id.
        text: the whole text, which has not been split yet.
        chunks: chunks that the file itself defines.
        size: bytes that it takes in its file.
        where: its place in the file, for messages.
        passages: texts that are kept apart. Each is split if it is too long.
    """

    id: str
    text: str | None
    chunks: tuple[str, ...] | None
    size: int
    where: str
    passages: tuple[str, ...] | None = None

    @property
    def empty(self) -> bool:
        """Whether it has no text except white space."""
        return not any(part.strip() for part in (self.chunks or self.passages or (self.text or "",)))

    def cut(self, split: Callable[[str], list[str]]) -> list[str]:
        """Its chunks. `split` cuts a text into chunks."""
        if self.chunks:
            return list(self.chunks)
        return [chunk for part in self.passages or (self.text or "",) for chunk in split(part)]


class Reader(ABC):
    """Reads one kind of file.

    Attributes:
        what: its name in messages.
        suffixes: endings of its files, in lower case.
        packages: names of the modules that it needs (of the extra `files`).
        own_ids: whether the file gives its documents their ids. Otherwise the file is one document, named by its path.
    """

    what: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    packages: ClassVar[tuple[str, ...]] = ()
    own_ids: ClassVar[bool] = False
    whole: ClassVar[bool] = True
    """Whether a file is held in memory as a whole. Its size then has a limit."""

    @property
    def missing(self) -> tuple[str, ...]:
        """The packages that aren't installed."""
        return tuple(name for name in self.packages if importlib.util.find_spec(name) is None)

    @property
    def needs(self) -> str:
        """What to do about missing packages."""
        return f"reading {self.what} needs {' and '.join(self.missing)}: pip install 'cachetune-rag[files]'"

    @abstractmethod
    def check(self, head: bytes, path: Path) -> None:
        """Refuse a file that is clearly of another kind, by its first bytes.

        Raises:
            CorpusError: says what kind of file it is.
        """

    @abstractmethod
    def read(self, stream: BinaryIO, name: str, path: Path) -> Iterator[SourceDocument]:
        """The file's documents.

        Args:
            stream: the file, from its beginning.
            name: id of the document, if the file is one document.
            path: the file's path, for messages.

        Raises:
            CorpusError: the file can't be read. Says where and why.
        """


def read_whole(stream: BinaryIO, path: Path) -> bytes:
    """All bytes of a file.

    Raises:
        CorpusError: it has more than `MOST_BYTES`.
    """
    data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise CorpusError(too_large(path))
    return data


def too_large(path: Path) -> str:
    """The message about a file with more than `MOST_BYTES`."""
    return (
        f"{visible_line(path)} is larger than {MOST_BYTES >> 20} MiB, the most that is read as one document: cut it into "
        "several files, or make it JSONL."
    )


def clean(text: str) -> str:
    """A page's text, without NUL and without halves of surrogate pairs, which are no Unicode text. Whole pairs are joined."""
    joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return joined.replace("\0", "")
