"""Prompts from files, to measure with: JSON lines with a query and perhaps its chunks, or text with a question a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cachetune_rag.cli.console import UsageError
from cachetune_rag.text.files.corpus import JSONL_SUFFIXES, read_text


@dataclass(frozen=True)
class Sample:
    """A prompt to be: `chunks` are None where they have yet to be retrieved; `where` names the line for messages."""

    query: str
    chunks: list[str] | None
    prefix: str | None
    where: str


def read_samples(paths: Iterable[str]) -> list[Sample]:
    """All samples of the files, in order; empty lines are left out.

    Raises:
        UsageError: a line is no sample, or there is none.
        CorpusError: a file can't be read as text.
    """
    paths = list(paths)
    found = [sample for path in paths for sample in _lines(path)]
    if not found:
        raise UsageError(f"no samples in {', '.join(paths)}: the files are empty.")
    return found


def _lines(path: str) -> Iterator[Sample]:
    # Not splitlines(): JSON may hold other line ends than these.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not (line := line.strip()):
            continue
        where = f"{path}:{number}"
        yield _from_json(line, where) if path.lower().endswith(JSONL_SUFFIXES) else Sample(line, None, None, where)


def _from_json(line: str, where: str) -> Sample:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is no JSON ({error}): correct the line, or remove it.") from None
    record = record if isinstance(record, dict) else {}
    query, chunks, prefix = (record.get(name) for name in ("query", "chunks", "prefix"))
    if not isinstance(query, str) or not query.strip() or not _texts(chunks) or not isinstance(prefix, str | None):
        raise UsageError(
            f'{where} is no sample: use {{"query": "...", "chunks": ["...", "..."]}} (and "prefix", if you use one); '
            "without chunks they are retrieved from the store."
        )
    return Sample(query, chunks, prefix, where)


def _texts(chunks: Any) -> bool:
    return chunks is None or (isinstance(chunks, list) and bool(chunks) and all(isinstance(c, str) for c in chunks))
