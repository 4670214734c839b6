"""Reading a corpus from files: text and Markdown (a file is a document) and JSONL (a line is a document).

Nothing but the list of files is held: documents come one at a time, so a corpus may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachetune_rag.errors import CacheTuneError

TEXT_SUFFIXES = (".txt", ".md", ".markdown", ".rst")
JSONL_SUFFIX = ".jsonl"
_SNIFF = 8192
_BOM = b"\xef\xbb\xbf"


class CorpusError(CacheTuneError):
    """A file or line can't be read as documents; the message names it, what is allowed and what to do."""


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus.

    Attributes:
        path: where it is.
        id: document id if it is a text file: its path below the folder that was given, or its name if it was given itself.
        size: bytes.
    """

    path: Path
    id: str
    size: int

    @property
    def jsonl(self) -> bool:
        """Whether every line is a document of its own."""
        return self.path.suffix.lower() == JSONL_SUFFIX


@dataclass(frozen=True)
class SourceDocument:
    """A document as read: `text` is still to be split, `chunks` are as the author cut them; exactly one is set.

    `size` is what it takes in its file, in bytes, and `where` names that place for messages.
    """

    id: str
    text: str | None
    chunks: tuple[str, ...] | None
    size: int
    where: str

    @property
    def empty(self) -> bool:
        """No text but white space."""
        return not any(part.strip() for part in (self.chunks or (self.text or "",)))


class Corpus:
    """The documents below some paths, in an order that depends on the names only."""

    def __init__(self, files: list[SourceFile]):
        self.files = files
        self.size = sum(file.size for file in files)

    @classmethod
    def scan(cls, paths: Iterable[str | os.PathLike[str]]) -> Corpus:
        """Find the files and check that each opens and looks like text; documents are read later.

        A folder is walked: hidden files and folders, links to folders and other extensions are left out. A file that is
        named itself is read whatever its extension. A file reached twice is read once.

        Raises:
            CorpusError: a path is missing, unreadable or binary, nothing was found, or two files get the same id.
        """
        files: list[SourceFile] = []
        seen: set[tuple[int, int]] = set()
        ids: dict[str, Path] = {}
        for given in map(Path, paths):
            for path, name in _find(given):
                info = _status(path)
                if (info.st_dev, info.st_ino) in seen:
                    continue
                seen.add((info.st_dev, info.st_ino))
                file = SourceFile(path, _checked_name(name, path), info.st_size)
                _sniff(path)
                if not file.jsonl and ids.setdefault(file.id, path) is not path:
                    raise CorpusError(
                        f"{ids[file.id]} and {path} would both be document {file.id!r}: give the folder above both, so "
                        "that their ids (paths below it) differ."
                    )
                files.append(file)
        if not files:
            allowed = ", ".join([*TEXT_SUFFIXES, JSONL_SUFFIX])
            raise CorpusError(
                f"no documents in {', '.join(map(str, paths))}: folders are searched for files that end in {allowed} "
                "and are not hidden; a file with another ending has to be named itself."
            )
        return cls(files)

    def documents(self) -> Iterator[SourceDocument]:
        """Every document, read as it is asked for.

        Raises:
            CorpusError: a file is not UTF-8, a JSONL line is broken, or an id comes twice; names the file and line.
        """
        # 16 bytes of the id's hash instead of id and place, so that millions of documents cost little memory.
        seen: dict[bytes, tuple[int, int]] = {}
        for number, file in enumerate(self.files):
            for line, document in enumerate(_read(file), start=1):
                digest = hashlib.blake2b(document.id.encode(), digest_size=16).digest()
                if digest in seen:
                    first = self.files[seen[digest][0]].path
                    raise CorpusError(
                        f"{document.where}: document {document.id!r} came before, as document {seen[digest][1]} of {first}. "
                        "Ids must be unique; the later document would replace the earlier."
                    )
                seen[digest] = (number, line)
                yield document


def read_text(path: str | os.PathLike[str]) -> str:
    """The whole text of one file.

    Raises:
        CorpusError: it is missing, unreadable, binary or not UTF-8.
    """
    file = Path(path)
    if not stat.S_ISREG(_status(file).st_mode):
        raise CorpusError(f"{file} is no regular file: give a text file.")
    _sniff(file)
    return _decode(file.read_bytes(), file)


def _find(given: Path) -> Iterator[tuple[Path, str]]:
    """Files below a path, each with its id."""
    mode = _status(given).st_mode
    if stat.S_ISDIR(mode):
        yield from ((path, path.relative_to(given).as_posix()) for path in _walk(given))
    elif stat.S_ISREG(mode):
        yield given, given.name
    else:
        raise CorpusError(f"{given} is no regular file or folder: give text, Markdown or JSONL files.")


def _walk(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise CorpusError(f"{folder} can't be searched: {error.strerror}. Check its permissions.") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = folder / entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(path)
        elif path.suffix.lower() in (*TEXT_SUFFIXES, JSONL_SUFFIX) and entry.is_file():
            yield path


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        raise CorpusError(f"{path} does not exist: check the path.") from None
    except OSError as error:
        raise CorpusError(f"{path} can't be read: {error.strerror}.") from error


def _checked_name(name: str, path: Path) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise CorpusError(
            f"the name of {os.fsencode(path)!r} is not UTF-8 and can't be a document id: rename it."
        ) from None
    return name


def _sniff(path: Path) -> None:
    """Refuse what is clearly no text before any work is done."""
    try:
        with path.open("rb") as stream:
            head = stream.read(_SNIFF)
    except OSError as error:
        raise CorpusError(f"{path} can't be read: {error.strerror}. Check its permissions.") from error
    if head.startswith((b"%PDF-", b"PK\x03\x04", b"\x1f\x8b")) or (b"\0" in head and not _utf16(head)):
        raise CorpusError(
            f"{path} is a binary file: only text can be indexed (plain text, Markdown, JSONL). Convert it first."
        )
    if _utf16(head):
        raise CorpusError(f"{path} is UTF-16, not UTF-8: convert it, e.g. with iconv -f UTF-16 -t UTF-8.")


def _utf16(head: bytes) -> bool:
    return head.startswith((b"\xff\xfe", b"\xfe\xff"))


def _read(file: SourceFile) -> Iterator[SourceDocument]:
    try:
        with file.path.open("rb") as stream:
            if file.jsonl:
                for number, line in enumerate(stream, start=1):
                    document = _parse_line(line, number, file.path)
                    if document is not None:
                        yield document
            else:
                data = stream.read()
                yield SourceDocument(file.id, _decode(data, file.path), None, len(data), str(file.path))
    except OSError as error:
        raise CorpusError(f"{file.path} can't be read: {error.strerror}.") from error


def _decode(data: bytes, path: Path) -> str:
    """Text exactly as in the file, line ends included; only a byte order mark is dropped."""
    try:
        text = data.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise CorpusError(_not_utf8(f"{path}:{line}", error)) from None
    if "\0" in text:
        raise CorpusError(
            f"{path} holds NUL bytes, so it is a binary file: only text can be indexed. Convert it first."
        )
    return text


def _parse_line(line: bytes, number: int, path: Path) -> SourceDocument | None:
    where = f"{path}:{number}"
    if number == 1:
        line = line.removeprefix(_BOM)
    if not line.strip():
        return None
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise CorpusError(_not_utf8(where, error)) from None
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise CorpusError(f'{where} is not JSON ({reason}): each line must be {{"id": ..., "text": ...}}.') from None
    if not isinstance(record, dict):
        raise CorpusError(f'{where} is {_kind(record)}, not an object: each line must be {{"id": ..., "text": ...}}.')
    name = _check_id(record, where)
    if ("text" in record) == ("chunks" in record):
        given = "both" if "text" in record else "neither"
        raise CorpusError(f'{where} (document {name!r}) has {given} of "text" and "chunks": give exactly one.')
    if "text" in record:
        return SourceDocument(name, _check_text(record["text"], "text", where), None, len(line), where)
    chunks = record["chunks"]
    if not isinstance(chunks, list):
        raise CorpusError(f'{where}: "chunks" is {_kind(chunks)}: use a list of strings.')
    texts = tuple(_check_text(chunk, f"chunks[{i}]", where) for i, chunk in enumerate(chunks))
    return SourceDocument(name, None, texts, len(line), where)


def _check_id(record: dict[str, Any], where: str) -> str:
    if "id" not in record:
        raise CorpusError(f'{where} has no "id": give each document a unique string.')
    name = record["id"]
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not name:
        raise CorpusError(f'{where}: "id" is {_kind(name)}: use a string that is not empty (or a whole number).')
    return _check_text(name, "id", where)


def _check_text(value: object, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise CorpusError(f'{where}: "{field}" is {_kind(value)}: use a string.')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise CorpusError(
            f'{where}: "{field}" holds half of a surrogate pair, which is no Unicode text: repair it.'
        ) from None
    return value


def _kind(value: object) -> str:
    """What JSON calls a value."""
    if value == "":
        return "an empty string"
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names[type(value)]


def _not_utf8(where: str, error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"{where} is not UTF-8 (byte 0x{byte:02x}): convert it, e.g. with iconv -f LATIN1 -t UTF-8."
