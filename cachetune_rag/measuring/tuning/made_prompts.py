"""Prompts made of chunks of the store, for tuning where the user gives no samples."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from cachetune_rag.errors import ConfigError
from cachetune_rag.measuring.bench import Bench
from cachetune_rag.text.prompts.prompt import Prompt

QUERY = "Which of these passages matters most here, what does it say, and what follows from it for the others?"
"""The query of made prompts. What it asks doesn't matter, because times depend only on its length, which is that of a usual question."""
_LOOKED_AT = 256
"""The most chunks that prompts are made of: enough for any prompt, and few enough to open quickly."""


def made(bench: Bench, *, tokens: int, count: int) -> list[Prompt]:
    """`count` prompts of about `tokens` chunk tokens each, made of stored chunks drawn at random (always the same ones).

    A prompt has fewer tokens where the store holds fewer, or the model's context ends. All chunks are of one codec: that of most of
    those drawn from.

    Raises:
        ConfigError: the store holds no chunk that the engine could use.
    """
    generator = random.Random(0)
    stored = _drawn(bench, generator)
    if not stored:
        raise ConfigError("the store holds no chunks of this model: precompute some documents first, or give samples.")
    [(wanted, _)] = Counter(codec for *_, codec in stored).most_common(1)
    chunks = [(text, size) for text, size, codec in stored if codec == wanted]
    if bench.adapter.max_positions is not None:
        around = len(bench.prompt(QUERY, []).ids)
        tokens = min(tokens, bench.adapter.max_positions - around - 1)
    prompts = []
    for _ in range(count):
        generator.shuffle(chunks)
        prompts.append(bench.prompt(QUERY, _up_to(bench, chunks, tokens)))
    return prompts


def codec_of(bench: Bench, prompts: Sequence[Prompt]) -> str:
    """The one codec that the prompts' chunks are stored with.

    Raises:
        ConfigError: there are several, or none of the chunks is stored.
    """
    chunks = {ids for prompt in prompts for ids in prompt.chunk_ids if ids}
    codecs = {codec for ids in chunks if (codec := bench.codec_of(bench.key(ids))) is not None}
    if len(codecs) != 1:
        found = f"are stored as {' and '.join(sorted(codecs))}" if codecs else "don't stay in the store"
        raise ConfigError(f"the samples' chunks {found}: tune with chunks of one codec, within the store's budgets.")
    return codecs.pop()


def _drawn(bench: Bench, generator: random.Random) -> list[tuple[str, int, str]]:
    """(text, tokens, codec) of stored chunks: a random sample, drawn in one pass over all texts."""
    kept: list[tuple[Any, str, int]] = []
    for seen, each in enumerate(bench.store.texts(namespace=bench.namespace)):
        if len(kept) < _LOOKED_AT:
            kept.append(each)
        elif (place := generator.randrange(seen + 1)) < _LOOKED_AT:
            kept[place] = each
    return [(text, size, codec) for key, text, size in kept if (codec := bench.codec_of(key)) is not None]


def _up_to(bench: Bench, chunks: Sequence[tuple[str, int]], tokens: int) -> list[str]:
    """Texts of the first chunks that fit into `tokens` tokens with the text between them. At least one."""
    one, two = (len(bench.prompt(QUERY, ["a"] * count).ids) for count in (1, 2))
    between = two - one
    taken: list[str] = []
    for text, size in chunks:
        if taken and tokens < size + between:
            break
        taken.append(text)
        tokens -= size + between
    return taken
