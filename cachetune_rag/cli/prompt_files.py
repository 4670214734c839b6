"""Reads prompts to measure with from files: JSON lines with a query and perhaps its chunks, or text with a question in each line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cachetune_rag.cli.console import UsageError
from cachetune_rag.cli.passages import retrieve
from cachetune_rag.text.files.corpus import JSONL_SUFFIXES, read_text

if TYPE_CHECKING:
    from cachetune_rag.engine import CacheTune
    from cachetune_store import ChunkStore


@dataclass(frozen=True)
class PromptFromFile:
    """A prompt from a file. `chunks` is None if they have to be retrieved. `where` names file and line for messages."""

    query: str
    chunks: list[str] | None
    prefix: str | None
    where: str


def read_samples(paths: Iterable[str]) -> list[PromptFromFile]:
    """All prompts of the files, in order. Empty lines are skipped.

    Raises:
        UsageError: a line is not a prompt, or there are none.
        CorpusError: a file can't be read as text.
    """
    paths = list(paths)
    found = [sample for path in paths for sample in _lines(path)]
    if not found:
        raise UsageError(f"no samples in {', '.join(paths)}: the files are empty.")
    return found


def prompts_from(
    engine: CacheTune, store: ChunkStore, given: Iterable[PromptFromFile], documents: list[str], top_k: int
) -> list[dict[str, str | list[str] | None]]:
    """The prompts as `engine.calibrate` and `engine.tune` take them. Chunks that a file doesn't give are retrieved.

    Args:
        engine, store: where passages are retrieved from.
        given: the prompts of the files.
        documents: retrieve from these documents only; empty: from all.
        top_k: how many passages to retrieve for a prompt.

    Raises:
        UsageError: no passage fits a prompt; the message names its line.
    """
    return [_prompt(engine, store, each, documents, top_k) for each in given]


def _prompt(
    engine: CacheTune, store: ChunkStore, given: PromptFromFile, documents: list[str], top_k: int
) -> dict[str, str | list[str] | None]:
    chunks = given.chunks
    if chunks is None:
        try:
            chunks = [passage.text for passage in retrieve(engine, store, given.query, documents, top_k)]
        except UsageError as error:
            raise UsageError(f"{given.where}: {error}") from error
    return {"query": given.query, "chunks": chunks, "prefix": given.prefix}


def _lines(path: str) -> Iterator[PromptFromFile]:
    # Not splitlines(): JSON may hold other line ends than these.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not (line := line.strip()):
            continue
        where = f"{path}:{number}"
        yield (
            _from_json(line, where)
            if path.lower().endswith(JSONL_SUFFIXES)
            else PromptFromFile(line, None, None, where)
        )


def _from_json(line: str, where: str) -> PromptFromFile:
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
    return PromptFromFile(query, chunks, prefix, where)


def _texts(chunks: Any) -> bool:
    return chunks is None or (isinstance(chunks, list) and bool(chunks) and all(isinstance(c, str) for c in chunks))
