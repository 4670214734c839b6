"""Other ways to read a prompt of known chunks sooner: prefix caching, and the package kvboost.

`ttft_gpu.py` times them in its rounds, on the same model and GPU (phases "peers" and "kvboost"). The third one, reuse without recompute, is
this package's selector "none".
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from speed.machine import synchronize
from speed.shapes import tokenizer
from transformers import DynamicCache


class PrefixCaching:
    """Keeps the cache of one prompt, without its query, on the device. A request computes only what follows the common beginning.

    Args:
        model: the model.
        ids: token ids of the prompt whose cache is kept.
        query: how many of the last ids are the query.

    Attributes:
        cache: what is kept.
    """

    @torch.no_grad()
    def __init__(self, model: Any, ids: Sequence[int], query: int):
        self._model, self._ids = model, list(ids[:-query])
        self.cache = DynamicCache()
        # transformers 5.24 renamed the argument, and warns about the old name.
        self._argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self._forward(self._ids, self.cache)

    @torch.no_grad()
    def request(self, ids: Sequence[int]) -> tuple[float, dict[str, int]]:
        """Seconds to the last token's logits, and how many tokens were found in the cache."""
        started = time.perf_counter()
        found = self._shared(ids)
        cache = self.cache if found == len(self._ids) else self._first(found)
        self._forward(ids[found:], cache)
        synchronize(self._model.device.type)
        took = time.perf_counter() - started
        if more := self.cache.get_seq_length() - len(self._ids):
            self.cache.crop(-more)
        return took, {"reused": found, "prompt_tokens": len(ids)}

    def _forward(self, ids: Sequence[int], cache: DynamicCache) -> None:
        given = torch.tensor([ids], device=self._model.device)
        self._model(input_ids=given, use_cache=True, logits_to_keep=1, **{self._argument: cache})

    def _shared(self, ids: Sequence[int]) -> int:
        """How many tokens both have at their beginning. A prompt's last token is not counted, as it is always computed."""
        most = min(len(self._ids), len(ids) - 1)
        if list(ids[:most]) == self._ids[:most]:
            return most
        return next(i for i in range(most) if ids[i] != self._ids[i])

    def _first(self, count: int) -> DynamicCache:
        cache = DynamicCache()
        for number, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[:, :, :count], layer.values[:, :, :count], number)
        return cache


class PeerMissingError(RuntimeError):
    """The package isn't installed or doesn't run here. The message says why."""


@dataclass(frozen=True)
class KVBoostRun:
    """What a request reports: `reused`, the tokens from its cache, and `own`, its own `ttft_ms` in seconds."""

    reused: int
    prompt_tokens: int
    own: float


class KVBoost:
    """kvboost (PyPI, 0.9.0) with its strategy `cacheblend`, on a model in memory.

    It splits a prompt from its beginning, every `chunk_size` tokens. Here nothing stands before or between the chunks, so that it finds
    them in any order. Its own `ttft_ms` doesn't include assembly and recompute; here, time is counted from the call to the first token
    (`on_token`).

    Args:
        model: the model.
        chunks: texts of `chunk_tokens` tokens each.
        chunk_tokens: its chunk_size.
        ratio: its recompute_ratio.

    Raises:
        PeerMissingError: the package can't be imported, or refuses the model.
    """

    def __init__(self, model: Any, chunks: Sequence[str], chunk_tokens: int, ratio: float):
        try:
            from kvboost import KVBoost as Engine
        except ImportError as error:
            raise PeerMissingError(f"kvboost is not installed: {error}") from error
        try:
            self._engine = Engine(
                model=model, tokenizer=tokenizer(bos=False), max_cache_bytes=1 << 40, chunk_size=chunk_tokens,
                max_chunks=1 << 20, recompute_strategy="cacheblend", recompute_ratio=ratio, device=model.device.type,
            )  # fmt: skip
            for text in chunks:
                self._engine.warm(text)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise PeerMissingError(f"kvboost doesn't run here: {type(error).__name__}: {error}") from error

    def request(self, chunks: Sequence[str], query: str) -> tuple[float, KVBoostRun]:
        """Seconds to the first token. The query is not stored."""
        first: list[float] = []
        started = time.perf_counter()
        result = self._engine.generate(
            "".join(chunks) + query, max_new_tokens=1, cacheable_prefix_len=0,
            on_token=lambda _token: first.append(time.perf_counter()),
        )  # fmt: skip
        return first[0] - started, KVBoostRun(result.cached_tokens, result.prompt_tokens, result.ttft_ms / 1e3)
