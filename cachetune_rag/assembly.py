"""Prefill of one prompt from the store: look up, select, assemble, recompute."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from cachetune_rag.config import ReuseConfig
from cachetune_rag.model import KVBuffers, ModelAdapter
from cachetune_rag.pipeline.loader import DamagedSourceError, LayerLoader, Source
from cachetune_rag.prompt import Prompt
from cachetune_rag.report import Report
from cachetune_rag.selection import ReusedChunk, get_selector
from cachetune_store import ChunkKey, ChunkReader, ChunkStore, DamagedChunkError, Namespace, make_key


@dataclass(frozen=True)
class PrefillState:
    """A prompt that has been read; decoding goes on from here.

    Attributes:
        logits: of the prompt's last token, [1, vocab].
        cache: an ordinary transformers cache of the whole prompt, in position order.
        report: what happened.
        prompt: the prompt.
        missed: numbers of the chunks of the prompt that were not in the store (each key once).
    """

    logits: Tensor
    cache: Cache
    report: Report
    prompt: Prompt
    missed: tuple[int, ...] = ()


class Assembler:
    """Prefills prompts with one model from one store. The caller holds the model's lock."""

    def __init__(self, adapter: ModelAdapter, store: ChunkStore, namespace: Namespace, pool: ThreadPoolExecutor):
        self._adapter, self._store, self._namespace, self._pool = adapter, store, namespace, pool

    def key(self, token_ids: Sequence[int]) -> ChunkKey:
        """The key of a chunk."""
        return make_key(self._namespace, token_ids)

    def full_prefill(self, prompt: Prompt, started: float) -> PrefillState:
        """The reference: every token through the model, nothing read."""
        logits, cache = self._adapter.full_forward(self._ids(prompt))
        self._wait()
        took = time.perf_counter() - started
        report = Report(len(prompt.ids), 0, 0, 0, {}, 1.0, "all", took, {"compute": took}, full=True)
        return PrefillState(logits, cache, report, prompt)

    def prefill(self, prompt: Prompt, config: ReuseConfig, started: float) -> PrefillState:
        """Prefill with reuse. A damaged chunk is set aside and the request starts over with that chunk missing."""
        damaged = 0
        while True:
            try:
                return self._attempt(prompt, config, started, damaged)
            except DamagedSourceError as error:
                self._store.discard(error.key)
                damaged += 1

    def _attempt(self, prompt: Prompt, config: ReuseConfig, started: float, damaged: int) -> PrefillState:
        with ExitStack() as stack:
            clock = _Clock()
            found, missed, first_missed = self._look_up(prompt, stack)
            timings = {"lookup": clock.lap()}
            base = torch.ones(len(prompt.ids), dtype=torch.bool)  # computed whatever the selector says
            for start, reader in found:
                base[start : start + reader.layout.tokens] = False
            chosen, buffers, loader = self._select(prompt, found, base, config, stack)
            timings["select"] = clock.lap()
            if bool(chosen.all()):
                logits, cache = self._adapter.full_forward(self._ids(prompt))
            else:
                assert buffers is not None
                assert loader is not None
                before = loader.seconds
                loader.set_sources([_needed(start, reader, chosen) for start, reader in found])
                places = chosen.nonzero()[:, 0].to(self._adapter.device)
                logits = self._adapter.selective_forward(self._ids(prompt)[places], places, buffers, loader.load)
                cache = buffers.to_cache()
                timings["load"] = loader.seconds - before
            self._wait()
            timings["compute"] = clock.lap() - timings.get("load", 0.0)
            ttft = time.perf_counter() - started
            read: dict[str, int] = {}
            for reader in {id(r): r for _, r in found}.values():
                read[reader.tier] = read.get(reader.tier, 0) + reader.bytes_read
                self._promote(reader)
            stored = sum(r.layout.tokens for _, r in found)
            reused = int((~chosen).sum())
            report = Report(
                len(prompt.ids),
                reused,
                stored - reused,
                missed,
                read,
                config.ratio,
                config.selector,
                ttft,
                timings,
                damaged,
                prompt.recognised,
            )
            return PrefillState(logits, cache, report, prompt, first_missed)

    def _promote(self, reader: ChunkReader) -> None:
        """Let the next request find the chunk in host memory. The answer is out, so damage is only set aside."""
        try:
            reader.promote()
        except DamagedChunkError:
            self._store.discard(reader.key)

    def _look_up(self, prompt: Prompt, stack: ExitStack) -> tuple[list[tuple[int, ChunkReader]], int, tuple[int, ...]]:
        """Open the chunks of the prompt: (start, reader) of each that is stored, missed tokens, missed chunk numbers."""
        readers: dict[ChunkKey, ChunkReader | None] = {}
        found: list[tuple[int, ChunkReader]] = []
        missed, first_missed = 0, []
        for span in prompt.spans:
            ids = prompt.chunk_ids[span.chunk]
            if not ids:
                continue
            key = self.key(ids)
            if key not in readers:
                reader = self._store.open(key)
                readers[key] = reader
                if reader is None:
                    first_missed.append(span.chunk)
                else:
                    stack.enter_context(reader)
            if (opened := readers[key]) is None:
                missed += len(ids)
            else:
                found.append((span.start, opened))
        return found, missed, tuple(first_missed)

    def _select(
        self,
        prompt: Prompt,
        found: list[tuple[int, ChunkReader]],
        base: Tensor,
        config: ReuseConfig,
        stack: ExitStack,
    ) -> tuple[Tensor, KVBuffers | None, LayerLoader | None]:
        """Which tokens are computed, bool [length]; with buffers and loader where something is reused."""
        if not found or len(prompt.ids) <= self._adapter.reuse_beyond:
            return torch.ones_like(base), None, None
        buffers = self._adapter.new_buffers(len(prompt.ids))
        loader = LayerLoader(
            self._adapter, [Source(r, start, r.layout.tokens) for start, r in found], buffers, self._pool
        )
        stack.callback(loader.drain)
        context = _Context(self._adapter, prompt, found, base, buffers, loader)
        places = get_selector(config.selector).select(context, config.ratio)
        chosen = base.clone()
        chosen[places] = True
        return chosen, buffers, loader

    def _ids(self, prompt: Prompt) -> Tensor:
        return torch.tensor(prompt.ids, dtype=torch.int64, device=self._adapter.device)

    def _wait(self) -> None:
        if self._adapter.device.type == "cuda":
            torch.cuda.synchronize(self._adapter.device)


class _Context:
    """What a selector sees; see `SelectionContext`."""

    def __init__(
        self,
        adapter: ModelAdapter,
        prompt: Prompt,
        found: list[tuple[int, ChunkReader]],
        base: Tensor,
        buffers: KVBuffers,
        loader: LayerLoader,
    ):
        self.chunks = [ReusedChunk(start, r.order, r.scores) for start, r in found]
        self.length, self.num_layers = len(prompt.ids), adapter.num_layers
        self._adapter, self._prompt, self._base, self._buffers, self._loader = (
            adapter,
            prompt,
            base,
            buffers,
            loader,
        )

    @property
    def seed(self) -> int:
        """A number that depends on the prompt's token ids alone."""
        return int.from_bytes(hashlib.sha256(repr(self._prompt.ids).encode()).digest()[:7])

    def observe_attention(self, num_layers: int, queries: int, observe: Callable[[int, Tensor], None]) -> None:
        """See `SelectionContext`."""
        device = self._adapter.device
        places = self._base.nonzero()[:, 0].to(device)
        ids = torch.tensor(self._prompt.ids, dtype=torch.int64, device=device)[places]
        self._adapter.observe_attention(
            ids, places, self._buffers, num_layers, queries, before=self._loader.load, observe=observe
        )


def _needed(start: int, reader: ChunkReader, chosen: Tensor) -> Source:
    """Rows to read of a chunk: all but the last ones in ranking order that are recomputed anyway (sparse transfer)."""
    kept = (~chosen[start + reader.order]).nonzero()
    return Source(reader, start, int(kept[-1]) + 1 if len(kept) else 0)


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        took, self._last = now - self._last, now
        return took
