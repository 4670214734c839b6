"""JSON lines: every line is a document with an id, and either a text or chunks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cachetune_rag.checking.escaping import visible_line
from cachetune_rag.text.files.readers.base import MOST_BYTES, CorpusError, Reader, SourceDocument
from cachetune_rag.text.files.readers.plain import BOM, not_utf8, refuse_binary
from cachetune_store.printing import shown

JSONL_SUFFIXES = (".jsonl", ".ndjson")


class JsonLinesReader(Reader):
    """A line is `{"id": ..., "text": ...}` or `{"id": ..., "chunks": [...]}`; other keys are ignored."""

    what = "JSONL"
    suffixes = JSONL_SUFFIXES
    own_ids = True
    whole = False

    def check(self, head: bytes, path: Path) -> None:
        """Refuse what is clearly no text."""
        refuse_binary(head, path)

    def read(self, stream: BinaryIO, name: str, path: Path) -> Iterator[SourceDocument]:
        """A document for each line, except empty lines."""
        number = 0
        while line := stream.readline(MOST_BYTES + 1):
            number += 1
            if len(line) > MOST_BYTES:
                raise CorpusError(
                    f"{visible_line(path)}:{number} is longer than {MOST_BYTES >> 20} MiB: cut the document into several."
                )
            document = _parse_line(line, number, path)
            if document is not None:
                yield document


def _parse_line(line: bytes, number: int, path: Path) -> SourceDocument | None:
    where = f"{visible_line(path)}:{number}"
    if number == 1:
        line = line.removeprefix(BOM)
    if not line.strip():
        return None
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise CorpusError(not_utf8(where, error)) from None
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise CorpusError(f'{where} is not JSON ({reason}): each line must be {{"id": ..., "text": ...}}.') from None
    if not isinstance(record, dict):
        raise CorpusError(f'{where} is {_kind(record)}, not an object: each line must be {{"id": ..., "text": ...}}.')
    name = _check_id(record, where)
    if ("text" in record) == ("chunks" in record):
        given = "both" if "text" in record else "neither"
        raise CorpusError(f'{where} (document {shown(name)}) has {given} of "text" and "chunks": give exactly one.')
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
    """The kind of a JSON value, in words."""
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
