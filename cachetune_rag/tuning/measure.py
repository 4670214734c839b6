"""Timing requests whose chunks come from one tier, on an engine's own model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cachetune_rag.assembly import Assembler
from cachetune_rag.config import ReuseConfig
from cachetune_rag.errors import CacheTuneError
from cachetune_rag.prompt import Prompt
from cachetune_rag.tuning.cost import CostModel
from cachetune_store import ChunkStore
from cachetune_store.readers import DiskReader

if TYPE_CHECKING:
    from cachetune_rag.engine import CacheTune

_NO_LIMIT = 1 << 62


def tiers_of(engine: CacheTune) -> tuple[str, ...]:
    """The tiers that an engine's chunks can come from, fast ones first."""
    there = ["host"] if engine.store.host_budget else []
    return (*there, "disk") if engine.store.path is not None else tuple(there)


class TierMeasure:
    """Requests over fixed prompts, with every chunk on one tier; nothing of it is counted as a request. A context manager.

    The disk is read as for a request that finds nothing in host memory, past the page cache where the file system allows it.
    For the host tier the prompts' chunks are held in memory, besides what the store keeps there.

    Args:
        engine: whose model, store and threads are used. Other requests wait for each timed one.
        prompts: their chunks are all in the store.
        tier: "host" or "disk".
        selector: whose requests are timed.
    """

    def __init__(self, engine: CacheTune, prompts: Sequence[Prompt], tier: str, selector: str):
        self._engine, self._prompts, self._selector = engine, prompts, selector
        self._owned: ChunkStore | None = None
        if tier == "disk":
            self._owned = ChunkStore(engine.store.path, host_budget=0, disk_budget=_NO_LIMIT)
        elif engine.store.path is not None:
            self._owned = self._in_memory()
        self._assembler = Assembler(engine.adapter, self._owned or engine.store, engine.lead_ins, engine._pool)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owned is not None:
            self._owned.close()

    def ready(self, ratio: float, skipped: float) -> None:
        """Requests that are not timed: the first of a size compiles kernels, the second captures its CUDA graph."""
        for _ in range(2 if self._engine.adapter.cuda_kernels else 1):
            self.ttft(ratio, skipped)

    def ttft(self, ratio: float, skipped: float) -> float:
        """Seconds to a prompt's logits, the mean over the prompts.

        Raises:
            CacheTuneError: a chunk is gone from the store, so the time would be that of something else.
        """
        config = ReuseConfig(self._selector, ratio, skipped)
        return statistics.mean(self._time(prompt, config) for prompt in self._prompts)

    def full(self, rounds: int) -> float:
        """Seconds of full prefill, the median of `rounds` means over the prompts."""
        times = [statistics.mean(self._time(prompt, None) for prompt in self._prompts) for _ in range(rounds + 1)]
        return statistics.median(times[1:])  # the first warms up

    def cost(self, full: float, rounds: int) -> CostModel:
        """Times to move and to compute a token of a layer, given seconds of full prefill."""
        layers = self._engine.adapter.num_layers
        length = statistics.mean(len(prompt.ids) for prompt in self._prompts)
        rows = statistics.mean(sum(map(len, (p.chunk_ids[s.chunk] for s in p.spans))) for p in self._prompts)
        times = []
        for _ in range(rounds + 1):
            with self._engine._lock:
                self._engine._check_open()
                times.append(statistics.mean(self._assembler.transfer(prompt)[1] for prompt in self._prompts))
        return CostModel(
            move=statistics.median(times[1:]) / (layers * rows),
            compute=full / (layers * length),
            layers=layers,
            chunk_tokens=round(rows),
            other_tokens=round(length - rows),
        )

    def _time(self, prompt: Prompt, config: ReuseConfig | None) -> float:
        engine = self._engine
        with engine._lock:
            engine._check_open()
            started = time.perf_counter()
            if config is None:
                return self._assembler.full_prefill(prompt, started).report.ttft
            report = self._assembler.prefill(prompt, config, started).report
        if report.missed:
            raise CacheTuneError(
                f"{report.missed} tokens of the prompts' chunks left the store while it was tuned: give it a larger budget "
                "and tune again."
            )
        return report.ttft

    def _in_memory(self) -> ChunkStore:
        """The prompts' chunks, read from disk into a store of their own."""
        engine = self._engine
        ids = dict.fromkeys(ids for prompt in self._prompts for ids in prompt.chunk_ids if ids)
        memory = ChunkStore(None, host_budget=_NO_LIMIT)
        with ChunkStore(engine.store.path, host_budget=0, disk_budget=_NO_LIMIT) as disk:
            for key in map(engine._assembler.key, ids):
                reader = disk.open(key)
                if isinstance(reader, DiskReader):
                    with reader:
                        memory.write(reader.read_all())
        return memory
