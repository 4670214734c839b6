"""Records that continue real documents: chunks of a text, the tokens behind them as the query, and the next ones as the target."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from typing import Any

from cachetune_rag.text.prompts.prompt import PromptBuilder

from .forms import SYSTEM_TOKENS
from .records import Dataset, Record, slice_of
from .sources import Text

PREFIX = "Read the passages."
LEADS = 8
"""About how many documents are never evaluated. Lead-ins are taken from them."""
LEAD_TOKENS = 300
SKIPPED = 100
"""How many tokens at a document's beginning are left out. They are titles and tables of contents."""


@dataclass(frozen=True)
class Shape:
    """How many tokens a record has: its chunks, the query and the target."""

    chunks: int = 8
    chunk_tokens: int = 512
    query_tokens: int = 16
    target_tokens: int = 64

    @property
    def tokens(self) -> int:
        """All of its tokens."""
        return self.chunks * self.chunk_tokens + self.query_tokens + self.target_tokens


def read_documents(
    sources: Mapping[str, Iterable[Text]], tokenizer: Any, shape: Shape, first: int = 0, count: int = 40, seed: int = 0
) -> Dataset:
    """Records `first` to `first + count`. Sources take turns, and no document has more than two records.

    A chunk ends where a word ends, so it may be a few tokens shorter than given.

    Raises:
        ValueError: the documents are too few or too short.
    """
    prompts = PromptBuilder(tokenizer)
    wanted = -(-(first + count) // max(1, len(sources))) * 2
    leads: list[list[str]] = []
    spare: list[str] = []
    found: list[list[Record]] = []
    for name, texts in sources.items():
        kept = [text for text in texts if len(text.text) > 2 * shape.tokens]  # shorter ones can't have enough tokens
        random.Random(f"{seed} {name}").shuffle(kept)
        given_up = max(1, min(-(-LEADS // len(sources)), len(kept) // 3))
        lead_texts: list[str] = []
        records: list[Record] = []
        for text in kept:
            if len(records) >= wanted:
                break
            ids = _Tokens(text, tokenizer)
            places = range(SKIPPED, len(ids) - shape.tokens - 32, shape.tokens)
            if not places:
                continue
            if len(lead_texts) < given_up:
                lead_texts.append(ids.stretch(SKIPPED, LEAD_TOKENS))
                spare.append(ids.stretch(SKIPPED + LEAD_TOKENS, SYSTEM_TOKENS))
                continue
            made = (_record(ids, name, start, shape, prompts) for start in places)
            records += [record for record in made if record is not None][:2]
        leads.append(lead_texts)
        found.append(records)
    everything = _in_turn(found)
    # Ordered by source, because an engine takes lead-ins from everywhere in the text.
    lead_ins = tuple(text for texts in leads for text in texts)
    if not lead_ins:
        raise ValueError(f"no document of {', '.join(sources)} has {shape.tokens} tokens: use fewer or shorter chunks.")
    chosen = slice_of(everything, first, count, 0, f"documents ({', '.join(sources)})")
    return Dataset("documents", chosen, lead_ins, PREFIX, separator="", continues=True, spare=tuple(spare))


def shuffled(documents: Dataset, count: int, seed: int = 0) -> Dataset:
    """The first `count` records, with all chunks but the last in another order."""
    records = []
    for record in documents.records[:count]:
        *others, last = record.chunks
        rng = random.Random(f"{seed} {record.name}")
        rng.shuffle(others)
        while tuple(others) == record.chunks[:-1] and len(set(others)) > 1:
            rng.shuffle(others)
        records.append(replace(record, chunks=(*others, last)))
    return replace(documents, name="shuffled", records=tuple(records))


def recut(documents: Dataset, chunk_tokens: int, tokenizer: Any) -> Dataset:
    """The same records with their text in other chunks: each of at most about `chunk_tokens` tokens, and about as long as the others."""
    records = []
    for record in documents.records:
        ids = _Tokens(Text(record.name, "".join(record.chunks)), tokenizer)
        count = max(1, -(-len(ids) // chunk_tokens))
        cuts = [0]
        for number in range(1, count):
            tried = map(ids.cut, range(number * len(ids) // count, len(ids)))
            place = next((found for found in tried if found is not None and found[1] > cuts[-1]), None)
            if place is None:  # no word ends behind the last cut
                break
            cuts.append(place[1])
        chunks = (ids.between(*ends) for ends in pairwise([*cuts, ids.characters]))
        records.append(replace(record, chunks=tuple(chunks), form=recut_form(chunk_tokens)))
    return replace(documents, records=tuple(records))


def recut_form(chunk_tokens: int) -> str:
    """The name of the form of records whose text is in other chunks."""
    return f"{chunk_tokens}_tokens"


class _Tokens:
    """A document's tokens, and where each begins in the text."""

    def __init__(self, text: Text, tokenizer: Any):
        self.name, self._text = text.name, text.text
        encoded = tokenizer(self._text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        self._starts = [start for start, _ in encoded["offset_mapping"]]

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def characters(self) -> int:
        """Of the whole text."""
        return len(self._text)

    def stretch(self, first: int, count: int) -> str:
        """The text of `count` tokens from number `first` on, or of as many as there are."""
        start, end = (self._starts[min(place, len(self) - 1)] for place in (first, first + count))
        return self.between(start, end)

    def between(self, start: int, end: int) -> str:
        """The text between two of its characters."""
        return self._text[start:end]

    def cut(self, token: int) -> tuple[int, int] | None:
        """The last place at or before `token` where a word ends, as (token, character). None if there is none nearby.

        Texts that are cut before white space have the same tokens as before.
        """
        for place in range(token, max(token - 32, 0), -1):
            at = self._starts[place]  # the space before a word may belong to its token
            while at > 0 and self._text[at - 1].isspace():
                at -= 1
            if at > 0 and self._text[at].isspace():
                return place, at
        return None

    def end(self, token: int) -> int:
        """The character at which `token` begins."""
        return self._starts[token]


def _record(ids: _Tokens, source: str, start: int, shape: Shape, prompts: PromptBuilder) -> Record | None:
    """A record. None if the text has no place to cut."""
    cuts: list[tuple[int, int]] = []
    token = start
    for size in [*[shape.chunk_tokens] * shape.chunks, shape.query_tokens, 0]:
        found = ids.cut(token)
        if found is None or (cuts and found[1] <= cuts[-1][1]):
            return None
        cuts.append(found)
        token = found[0] + size
    *chunks, query = (ids.between(a, b) for (_, a), (_, b) in pairwise(cuts))
    rest = ids.between(cuts[-1][1], ids.end(cuts[-1][0] + shape.target_tokens + 8))
    target = prompts.encode(rest)[: shape.target_tokens]
    return Record(f"{source}/{ids.name}@{start}", source, tuple(chunks), query, tuple(target))


def _in_turn(lists: list[list[Any]]) -> list[Any]:
    """The first of each, then the second of each, and so on."""
    return [item for turn in zip_longest(*lists) for item in turn if item is not None]
