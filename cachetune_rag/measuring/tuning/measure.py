"""Timing requests whose chunks come from one tier, on an engine's own model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from cachetune_rag.errors import CacheTuneError, ConfigError
from cachetune_rag.measuring.bench import Bench
from cachetune_rag.measuring.tuning.cost import CostModel
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.text.prompts.prompt import Prompt
from cachetune_store import ChunkKey, ChunkStore
from cachetune_store.tier_kinds import TierKind, kind_of

_NO_LIMIT = 1 << 62


class TierTooSmallError(ConfigError):
    """A tier doesn't hold the prompts that are to be measured on it."""


class TierMeasure:
    """Requests over fixed prompts, with every chunk on one tier; nothing of it is counted as a request. A context manager.

    The disk is read as for a request that finds nothing in host memory, past the page cache where the file system allows it.
    For the host tier the prompts' chunks are held in memory, besides what the store keeps there; for the device tier on the
    device as well.

    Args:
        bench: times on the model, and has the prompts' chunks in its store. Other requests wait for each timed one.
        prompts: their chunks are all in the store.
        tier: the name of its kind; the store has it.
        selector: whose requests are timed.

    Attributes:
        bench: the same bench over a store of this measurement, which has the chunks on the one tier.

    Raises:
        TierTooSmallError: the chunks don't fit the store's device_budget, or the device.
    """

    def __init__(self, bench: Bench, prompts: Sequence[Prompt], tier: str, selector: str):
        self._prompts, self._selector = prompts, selector
        kind = kind_of(tier)
        if kind.lasting:
            # What the rows are read into is used again, as it is by requests where host memory is full.
            store = ChunkStore(bench.store.path, host_budget=0, disk_budget=_NO_LIMIT, read_memory=_NO_LIMIT)
        else:
            store = _in_memory(bench, prompts, kind)
        self.bench = bench.on(store)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bench.store.close()

    def ready(self, ratio: float, skipped: float) -> None:
        """Requests that are not timed: the first of a size compiles kernels, the second captures its CUDA graph."""
        for _ in range(2 if self.bench.adapter.cuda_kernels else 1):
            self.ttft(ratio, skipped)

    def ttft(self, ratio: float, skipped: float) -> float:
        """Seconds to a prompt's logits, the mean over the prompts.

        Raises:
            CacheTuneError: a chunk is gone from the store, so the time would be that of something else.
        """
        config = ReuseConfig(self._selector, ratio, skipped)
        return statistics.mean(self._time(prompt, config) for prompt in self._prompts)

    def full(self, rounds: int) -> list[float]:
        """Seconds of full prefill, `rounds` times: means over the prompts."""
        times = [statistics.mean(self._time(prompt, None) for prompt in self._prompts) for _ in range(rounds + 1)]
        return times[1:]  # the first warms up

    def cost(self, full: float, rounds: int) -> CostModel:
        """Times to move and to compute a token of a layer, given seconds of full prefill.

        They are what the machine can do, so of several times the least counts: whatever else ran can only have added.
        """
        layers = self.bench.adapter.num_layers
        length = statistics.mean(len(prompt.ids) for prompt in self._prompts)
        rows = statistics.mean(sum(map(len, (p.chunk_ids[s.chunk] for s in p.spans))) for p in self._prompts)
        times = [statistics.mean(self.bench.transfer(prompt)[1] for prompt in self._prompts) for _ in range(rounds + 1)]
        return CostModel(
            move=min(times[1:]) / (layers * rows),
            compute=full / (layers * length),
            layers=layers,
            chunk_tokens=round(rows),
            other_tokens=round(length - rows),
        )

    def _time(self, prompt: Prompt, config: ReuseConfig | None) -> float:
        report = self.bench.prefill(prompt, config).report
        if report.missed:
            raise CacheTuneError(
                f"{report.missed} tokens of the prompts' chunks left the store while it was tuned: give it a larger budget "
                "and tune again."
            )
        return report.ttft


def _in_memory(bench: Bench, prompts: Sequence[Prompt], kind: TierKind) -> ChunkStore:
    """The prompts' chunks in a store of their own, all on one tier."""
    budget = bench.store.tier(kind.name).budget if kind.copies else 0
    memory = ChunkStore(None, host_budget=_NO_LIMIT, device_budget=budget, device=bench.adapter.device)
    try:
        for key in dict.fromkeys(bench.key(i) for p in prompts for i in p.chunk_ids if i):
            chunk = bench.store.whole(key)
            if chunk is None:
                continue  # the first request will say so
            memory.write(chunk)
            if kind.copies and not _bring_up(key, memory, kind):
                raise TierTooSmallError(
                    f"device_budget ({budget} bytes) doesn't hold the prompts' chunks: give a larger one, tune with "
                    "shorter prompts (samples, or tokens), or tune another tier."
                )
    except BaseException:
        memory.close()
        raise
    return memory


def _bring_up(key: ChunkKey, store: ChunkStore, kind: TierKind) -> bool:
    """Have a chunk copied to the tier of this kind; whether it is there then."""
    for _ in range(2):
        reader = store.open(key)
        if reader is None:
            return False
        with reader:
            if reader.kind is kind:
                return True
            reader.promote()
    return False
