"""What became of every token and chunk of one prompt, for who wants to see it: a report only has the sums."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cachetune_rag.reuse.lookup import Faults, FoundChunks
from cachetune_rag.reuse.plan import Plan
from cachetune_rag.text.prompts.prompt import Prompt
from cachetune_store import ChunkKey, Namespace, make_key


class Fate(StrEnum):
    """What became of a token."""

    COMPUTED = "computed"
    """It stands outside of chunks, and went through the model."""
    KEPT = "kept"
    """It stands before the first chunk; its rows were kept from an earlier prompt that begins alike."""
    REUSED = "reused"
    """Its stored rows were used."""
    RECOMPUTED = "recomputed"
    """Its stored rows were read and found wanting, so it was computed again."""
    SKIPPED = "skipped"
    """It was computed again, and its stored rows were not even read."""
    MISSED = "missed"
    """It is part of a chunk that is not in the store, and was computed."""


FATES = tuple(Fate)
"""By number, as `Account.fates` has them."""


class Outcome(StrEnum):
    """What a lookup found of a chunk."""

    STORED = "stored"
    MISSED = "missed"
    DAMAGED = "damaged"
    UNREADABLE = "unreadable"
    TIMED_OUT = "timed out"
    EMPTY = "empty"


@dataclass(frozen=True)
class ChunkAccount:
    """One chunk at its place in the prompt.

    Attributes:
        number: of the chunk in the request.
        start, end: the tokens of the prompt that it has; places.
        key: its key; None for a chunk without tokens.
        outcome: what the lookup found.
        tier, codec: where its rows came from, and how they are stored there; "" where it isn't stored.
        deviations: of its tokens, in token order, as `ReusedChunk` has them; None where nothing of the chunk is reused, or it has none.
    """

    number: int
    start: int
    end: int
    key: ChunkKey | None
    outcome: Outcome
    tier: str = ""
    codec: str = ""
    deviations: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Account:
    """What became of one prompt.

    Its sums are those of the prompt's report, in which `recomputed` includes the skipped ones. A missed chunk that stands before the first
    stored one may have been computed for an earlier prompt: the report counts its tokens as missed and as kept, here they are kept.

    Attributes:
        fates: uint8 [length], the number in `FATES` of every token.
        chunks: every chunk, in the order of the prompt.
    """

    fates: NDArray[np.uint8]
    chunks: tuple[ChunkAccount, ...]

    def runs(self) -> list[tuple[int, int, Fate]]:
        """Start, end and fate of each longest stretch of tokens with the same fate."""
        return runs_of(self.fates)


def runs_of(fates: NDArray[np.uint8], start: int = 0, end: int | None = None) -> list[tuple[int, int, Fate]]:
    """`Account.runs` of the tokens [start, end) alone; places are the prompt's."""
    part = fates[start:end]
    if not len(part):
        return []
    cuts = [0, *(np.flatnonzero(part[1:] != part[:-1]) + 1).tolist(), len(part)]
    return [(start + a, start + b, FATES[part[a]]) for a, b in pairwise(cuts)]


def account_of(
    prompt: Prompt, namespace: Namespace, found: FoundChunks, plan: Plan | None, faults: Faults, kept: int
) -> Account:
    """The account of a prompt that was read, made while its chunks are open.

    Args:
        prompt: the prompt.
        namespace: what its chunks were looked up with.
        found: the chunks that were open.
        plan: what was computed; None if all of the prompt was.
        faults: chunks that could not be read.
        kept: tokens whose rows were kept from an earlier prompt.

    Raises:
        DamagedSourceError, StoreTimeoutError: a chunk's deviations can't be read.
    """
    readers = {span.chunk: reader for span, reader in found.chunks}
    fates = np.full(len(prompt.ids), FATES.index(Fate.COMPUTED), np.uint8)
    for span in prompt.spans:
        stored = span.chunk in readers
        fates[span.start : span.end] = FATES.index(Fate.RECOMPUTED if stored else Fate.MISSED)
    fates[:kept] = FATES.index(Fate.KEPT)
    deviations: dict[int, Tensor | None] = {}
    if plan is not None:
        reused = ~plan.computed.numpy()
        reused[: plan.ready] = False
        fates[reused] = FATES.index(Fate.REUSED)
        for source in plan.sources_to_read():
            fates[source.skipped] = FATES.index(Fate.SKIPPED)
        deviations = {source.start: source.as_reused(plan.loader.deviations).deviations for source in plan.sources}
    chunks = []
    for span in prompt.spans:
        ids = prompt.chunk_ids[span.chunk]
        key = make_key(namespace, ids) if ids else None
        reader = readers.get(span.chunk)
        chunks.append(
            ChunkAccount(
                span.chunk, span.start, span.end, key, _outcome(key, reader is not None, faults),
                "" if reader is None else reader.tier, "" if reader is None else reader.layout.codec,
                deviations.get(span.start - span.first),
            )
        )  # fmt: skip
    return Account(fates, tuple(chunks))


def _outcome(key: ChunkKey | None, stored: bool, faults: Faults) -> Outcome:
    if key is None:
        return Outcome.EMPTY
    if stored:
        return Outcome.STORED
    if key in faults.damaged:
        return Outcome.DAMAGED
    if key in faults.unreadable:
        return Outcome.UNREADABLE
    return Outcome.TIMED_OUT if key in faults.timed_out else Outcome.MISSED
