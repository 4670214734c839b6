"""Prompts of a benchmark of serving: chunks in changing orders, a short question behind them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from speed.shapes import letters

QUERY_TOKENS = 64
OWN_TOKENS = 8
"""Letters at a prompt's beginning by which it differs from all others: vLLM's prefix cache finds whole pages of at least 16 tokens."""
Order = Literal["shuffled", "same"]


@dataclass(frozen=True)
class Workload:
    """Makes prompts, as token ids.

    Attributes:
        tokenizer: one token for each letter.
        stored: texts of the chunks that are stored.
    """

    tokenizer: Any
    stored: Sequence[str]

    def prompts(
        self,
        context: int,
        count: int,
        seed: str,
        *,
        share: float = 1.0,
        order: Order = "shuffled",
        log_normal: bool = False,
        alike: bool = False,
    ) -> list[list[int]]:
        """`count` prompts with about `context` tokens of chunks each; no two have the same question.

        Args:
            context: tokens of chunks; with `log_normal`, the median of them.
            count: how many prompts.
            seed: the same seed gives the same prompts.
            share: of the chunks, so many are stored; the others are new in every prompt.
            order: "same" shows the same chunks in the same order in every prompt, as prefix caching likes it.
            log_normal: contexts vary from prompt to prompt (sigma 0.5, up to all stored chunks), in the same way for every seed.
            alike: prompts begin with the same letters. Otherwise each has its own, so that vLLM's prefix cache has nothing of it.
        """
        source, lengths = random.Random(f"{seed} {context} {share} {order}"), random.Random(f"lengths {context}")
        varied = [context * (lengths.lognormvariate(0, 0.5) if log_normal else 1) for _ in range(count)]
        return [
            self._prompt(source, f"{seed} {n}", "alike" if alike else f"{seed} {n}", tokens, share, order)
            for n, tokens in enumerate(varied)
        ]

    def covering(self, context: int) -> list[list[int]]:
        """Prompts of about `context` tokens of chunks each that have every stored chunk in one of them."""
        some = max(1, round(context / len(self.stored[0])))
        parts = [self.stored[start : start + some] for start in range(0, len(self.stored), some)]
        return [self._ids(part, f"covering {number}", f"covering {number}") for number, part in enumerate(parts)]

    def _prompt(
        self, source: random.Random, name: str, beginning: str, context: float, share: float, order: Order
    ) -> list[int]:
        length = len(self.stored[0])
        chunks = min(max(1, round(context / length)), len(self.stored))
        texts = list(self.stored[:chunks]) if order == "same" else source.sample(list(self.stored), chunks)
        new: Iterator[str] = iter(letters(name, chunks, length))
        for place in source.sample(range(chunks), chunks - round(share * chunks)):
            texts[place] = next(new)
        return self._ids(texts, name, beginning)

    def _ids(self, texts: Sequence[str], name: str, beginning: str) -> list[int]:
        query, head = letters(f"{name}?", 1, QUERY_TOKENS)[0], letters(f"{beginning}!", 1, OWN_TOKENS)[0]
        ids = self.tokenizer("\n\n".join([f"{head} Read the passages.", *texts, query])).input_ids
        return [int(i) for i in ids]
