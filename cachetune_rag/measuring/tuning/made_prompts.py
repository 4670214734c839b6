"""Prompts made of chunks of the store, for tuning without any of the user's own."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cachetune_rag.errors import ConfigError
from cachetune_rag.text.prompts.prompt import Prompt

if TYPE_CHECKING:
    from cachetune_rag.engine import CacheTune

QUERY = "Which of these passages matters most here, what does it say, and what follows from it for the others?"
"""The query of made prompts. What it asks doesn't matter; times depend on its length, which is a question's."""
_LOOKED_AT = 256
"""Chunks of the store that are drawn from, at most: enough for any prompt, and quick to open."""


def made(engine: CacheTune, *, tokens: int, count: int, codec: str | None = None) -> list[Prompt]:
    """`count` prompts of about `tokens` chunk tokens each, of stored chunks drawn at random (always the same ones).

    Args:
        tokens: fewer where the store holds fewer, or the model's context ends.
        codec: only chunks stored so; None: the codec of most of those drawn from.

    Raises:
        ConfigError: the store holds no chunk that this engine could use.
    """
    generator = random.Random(0)
    stored = _drawn(engine, generator)
    codecs = Counter(found for *_, found in stored)
    wanted = codec or (codecs.most_common(1)[0][0] if codecs else "")
    chunks = [(text, size) for text, size, found in stored if found == wanted]
    if not chunks:
        what = f" of codec {codec}" if codec else ""
        raise ConfigError(
            f"the store holds no chunks{what} of this model: precompute some documents first, or give samples."
        )
    if engine.adapter.max_positions is not None:
        around = len(engine.prompts.build(query=QUERY, chunks=[]).ids)
        tokens = min(tokens, engine.adapter.max_positions - around - 1)
    prompts = []
    for _ in range(count):
        generator.shuffle(chunks)
        prompts.append(engine.runtime.admission.prompt(QUERY, _up_to(engine, chunks, tokens), None, None))
    return prompts


def codec_of(engine: CacheTune, prompts: Sequence[Prompt]) -> str:
    """The one codec that the prompts' chunks are stored with.

    Raises:
        ConfigError: there are several, or none of the chunks is stored.
    """
    codecs = set()
    for ids in {ids for prompt in prompts for ids in prompt.chunk_ids if ids}:
        reader = engine.store.open(engine.runtime.assembler.key(ids))
        if reader is not None:
            with reader:
                codecs.add(reader.layout.codec)
    if len(codecs) != 1:
        found = f"are stored as {' and '.join(sorted(codecs))}" if codecs else "don't stay in the store"
        raise ConfigError(f"the samples' chunks {found}: tune with chunks of one codec, within the store's budgets.")
    return codecs.pop()


def _drawn(engine: CacheTune, generator: random.Random) -> list[tuple[str, int, str]]:
    """(text, tokens, codec) of stored chunks: a random sample of all of them, in one pass over the texts."""
    kept: list[tuple[Any, str, int]] = []
    for seen, each in enumerate(engine.store.texts(namespace=engine.namespace)):
        if len(kept) < _LOOKED_AT:
            kept.append(each)
        elif (place := generator.randrange(seen + 1)) < _LOOKED_AT:
            kept[place] = each
    found = []
    for key, text, size in kept:
        reader = engine.store.open(key)
        if reader is not None:
            with reader:
                found.append((text, size, reader.layout.codec))
    return found


def _up_to(engine: CacheTune, chunks: Sequence[tuple[str, int]], tokens: int) -> list[str]:
    """Texts of the first chunks, as many as `tokens` tokens hold (with what stands between them); one at least."""
    between = len(engine.prompts.build(query=QUERY, chunks=["a", "a"]).ids) - len(
        engine.prompts.build(query=QUERY, chunks=["a"]).ids
    )
    taken: list[str] = []
    for text, size in chunks:
        if taken and tokens < size + between:
            break
        taken.append(text)
        tokens -= size + between
    return taken
