"""Reads a corpus from files of the kinds in `readers`.

Only the list of files is kept in memory. Documents come one at a time, so a corpus may be larger than memory.

If a file that the user named can't be read, the run ends with the reason. If a file in a folder can't be read, it is left out, and
`Corpus.left_out` says so.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cachetune_rag.checking.escaping import visible_line
from cachetune_rag.text.files.folders import open_file, status, walk, why
from cachetune_rag.text.files.left_out import LeftOut
from cachetune_rag.text.files.readers import PLAIN, SUFFIXES, CorpusError, Reader, SourceDocument, reader_for
from cachetune_rag.text.files.readers.base import MOST_BYTES, read_whole, too_large
from cachetune_rag.text.files.readers.json_lines import JSONL_SUFFIXES
from cachetune_rag.text.files.readers.plain import decode
from cachetune_store.printing import shown

__all__ = ["JSONL_SUFFIXES", "Corpus", "CorpusError", "SourceDocument", "SourceFile", "read_passage", "read_text"]

_SNIFF = 8192


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus.

    Attributes:
        path: where it is.
        id: the id of its document, if the file is one document: its path below the folder that was given, or its name if the
            file itself was given.
        size: its bytes.
        reader: reads it.
        named: whether the file itself was given. Then the run ends if it can't be read.
    """

    path: Path
    id: str
    size: int
    reader: Reader
    named: bool


class Corpus:
    """The documents below some paths, in an order that only depends on names.

    Attributes:
        files: the files that are read.
        size: bytes of these files.
        left_out: the files that are not read. It grows while documents are read.
    """

    def __init__(self, files: list[SourceFile], left_out: LeftOut):
        self.files = files
        self.size = sum(file.size for file in files)
        self.left_out = left_out

    @classmethod
    def scan(cls, paths: Iterable[str | os.PathLike[str]]) -> Corpus:
        """Find the files, and check that each can be opened and looks like its kind. Documents are read later.

        Folders are searched. Hidden files and folders, links to folders, files with other endings and unreadable files are left out. A
        file that is given itself is read whatever its ending, as text if there is no reader for it. A file that is found twice is
        read once.

        Raises:
            CorpusError: a path that was given is missing or unreadable, nothing was found, or two files get the same id.
        """
        try:
            listed = [] if isinstance(paths, str | bytes) else list(paths)
        except TypeError:  # nothing that can be gone through, whatever it is called
            listed = []
        if not listed:
            raise CorpusError(f"paths is {shown(paths)}: use a list of files and folders.")
        files: list[SourceFile] = []
        left_out = LeftOut()
        seen: set[tuple[int, int]] = set()
        ids: dict[str, Path] = {}
        given = [_expanded(path) for path in listed]
        for path, name, named in (found for each in given for found in _find(each, left_out)):
            try:
                info = status(path)
                if (info.st_dev, info.st_ino) in seen:
                    continue
                file = _checked(path, name, info.st_size, named=named)
            except CorpusError as error:
                if named:
                    raise
                left_out.failed.append((path, str(error)))
                continue
            seen.add((info.st_dev, info.st_ino))
            if not file.reader.own_ids and ids.setdefault(file.id, path) is not path:
                raise CorpusError(
                    f"{visible_line(ids[file.id])} and {visible_line(path)} would both be document {shown(file.id)}: give the folder "
                    "above both, so that their ids (paths below it) differ."
                )
            files.append(file)
        if not files:
            raise CorpusError(
                f"no documents in {', '.join(map(visible_line, given))}: folders are searched for files that end in "
                f"{', '.join(SUFFIXES)} and are not hidden; a file with another ending has to be named itself."
                + "".join(f"\n{line}" for line in left_out.lines())
            )
        return cls(files, left_out)

    def documents(self, skipped: Callable[[int], None] = lambda size: None) -> Iterator[SourceDocument]:
        """All documents. Each is read when it is asked for.

        Args:
            skipped: called with the bytes of a file that are left out.

        Raises:
            CorpusError: a file that was given can't be read, no file can be read, or an id occurs twice. Names file and line.
        """
        # Ids are kept as hashes of 16 bytes, so that millions of documents take little memory.
        seen: dict[bytes, tuple[int, int]] = {}
        for number, file in enumerate(self.files):
            for line, document in enumerate(self.read(file, skipped), start=1):
                digest = hashlib.blake2b(document.id.encode(), digest_size=16).digest()
                if digest in seen:
                    first = self.files[seen[digest][0]].path
                    raise CorpusError(
                        f"{visible_line(document.where)}: document {shown(document.id)} came before, as document {seen[digest][1]} of "
                        f"{visible_line(first)}. Ids must be unique; the later document would replace the earlier."
                    )
                seen[digest] = (number, line)
                yield document
        if not seen and self.left_out.failed:
            raise CorpusError("\n".join(["nothing could be read.", *self.left_out.lines()]))

    def read(self, file: SourceFile, skipped: Callable[[int], None] = lambda size: None) -> Iterator[SourceDocument]:
        """A file's documents. If a file in a folder can't be read to its end, the rest of it is left out, and `left_out` says so.

        Args:
            file: the file.
            skipped: called with the bytes that are left out.

        Raises:
            CorpusError: a file that was given itself can't be read.
        """
        given = 0
        try:
            for document in _documents(file):
                given += document.size
                yield document
        except CorpusError as error:
            if file.named:
                raise
            after = " What comes before it in the file was read." if given else ""
            self.left_out.failed.append((file.path, f"{error}{after}"))
            skipped(max(0, file.size - given))


def read_text(path: str | os.PathLike[str]) -> str:
    """The whole text of one file, whatever its ending.

    Raises:
        CorpusError: it is missing, unreadable, binary or not UTF-8.
    """
    file = _expanded(path)
    with open_file(file) as stream:
        PLAIN.check(_head(stream, file), file)
        try:
            return decode(read_whole(stream, file), file)
        except OSError as error:
            raise CorpusError(why(error, file)) from error


def read_passage(path: str | os.PathLike[str]) -> str:
    """The text of one file as one passage: that of a page, PDF or table, or the file's own text.

    Raises:
        CorpusError: it can't be read.
    """
    file = _expanded(path)
    reader = reader_for(file)
    if reader is None or reader is PLAIN or reader.own_ids:
        return read_text(file)
    found = _documents(_checked(file, file.name, status(file).st_size, named=True))
    return "\n\n".join(part for document in found for part in document.cut(lambda text: [text]))


def _find(given: Path, left_out: LeftOut) -> Iterator[tuple[Path, str, bool]]:
    """The files below a path. Each comes with its id, and with whether it is the path itself."""
    mode = status(given).st_mode
    if stat.S_ISDIR(mode):
        yield from ((path, path.relative_to(given).as_posix(), False) for path in walk(given, left_out))
    elif stat.S_ISREG(mode):
        yield given, given.name, True
    else:
        raise CorpusError(f"{visible_line(given)} is no regular file or folder: give files, or folders of them.")


def _checked(path: Path, name: str, size: int, *, named: bool) -> SourceFile:
    """The file at a path. It is checked that it can be opened and looks like what its ending says."""
    reader = reader_for(path) or PLAIN
    if reader.missing:
        raise CorpusError(f"{visible_line(path)} can't be read yet: {reader.needs}.")
    _check_name(name, path)
    with open_file(path) as stream:
        reader.check(_head(stream, path), path)
    if reader.whole and size > MOST_BYTES:
        raise CorpusError(too_large(path))
    return SourceFile(path, name, size, reader, named)


def _documents(file: SourceFile) -> Iterator[SourceDocument]:
    try:
        with open_file(file.path) as stream:
            yield from file.reader.read(stream, file.id, file.path)
    except OSError as error:
        raise CorpusError(why(error, file.path)) from error


def _head(stream: BinaryIO, path: Path) -> bytes:
    """The first bytes. The stream is at its beginning afterwards."""
    try:
        head = stream.read(_SNIFF)
        stream.seek(0)
        return head
    except OSError as error:
        raise CorpusError(why(error, path)) from error


def _check_name(name: str, path: Path) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise CorpusError(
            f"the name of {visible_line(path)} is not UTF-8 and can't be a document id: rename it."
        ) from None


def _expanded(path: str | os.PathLike[str]) -> Path:
    """A path as the user meant it. A leading ~ is the home folder, unless there is a file or folder of that name.

    Raises:
        CorpusError: it is empty, or no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise CorpusError(f"a path is {shown(path)}, a {type(path).__name__}: use a string or a Path.")
    try:
        os.lstat(path)
    except UnicodeEncodeError:
        raise CorpusError(f"the path {shown(str(path))} is no text that a file's name can hold: check it.") from None
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            raise CorpusError(f"the path {shown(str(path))} is longer than the system takes: check it.") from None
    if not os.fspath(path):  # which Path would take for the current folder
        raise CorpusError(
            "a path is empty (a variable that isn't set, perhaps): give files or folders, or . for this one."
        )
    given = Path(path)
    if not os.path.lexists(given):
        with contextlib.suppress(RuntimeError):  # there is no such user: ~ is then part of the name
            return given.expanduser()
    return given
