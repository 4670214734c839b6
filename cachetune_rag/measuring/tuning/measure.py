"""Times requests whose chunks all come from one tier."""

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
from cachetune_store.units import NO_LIMIT


class TierTooSmallError(ConfigError):
    """The prompts that are to be measured on a tier don't fit into it."""


class TierMeasure:
    """Times fixed prompts while all their chunks are on one tier. A context manager.

    The disk tier is timed with nothing in host memory, and without the operating system's page cache where the file system allows it.
    For the host tier and the device tier, the prompts' chunks are copied into a store of their own, which takes additional memory.

    Args:
        bench: measures on the model. Its store has all chunks of the prompts. Requests wait for each timed prefill.
        prompts: what is timed.
        tier: the name of a tier that the store has.
        selector: the name of the selector.

    Attributes:
        bench: a bench over the store that has the chunks on this tier alone.

    Raises:
        TierTooSmallError: the chunks don't fit into the store's device_budget, or into the device's memory.
    """

    def __init__(self, bench: Bench, prompts: Sequence[Prompt], tier: str, selector: str):
        self._prompts, self._selector = prompts, selector
        kind = kind_of(tier)
        if kind.lasting:
            store = bench.store.alone(tier)
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
        """Run prefills that are not timed: the first of a size compiles kernels, the second captures its CUDA graph."""
        for _ in range(2 if self.bench.adapter.cuda_kernels else 1):
            self.ttft(ratio, skipped)

    def ttft(self, ratio: float, skipped: float) -> float:
        """Seconds until a prompt's logits are there, as the mean over the prompts.

        Raises:
            CacheTuneError: a chunk is no longer in the store, so that the time would include computing it.
        """
        config = ReuseConfig(self._selector, ratio, skipped)
        return statistics.mean(self._time(prompt, config) for prompt in self._prompts)

    def full(self, rounds: int) -> list[float]:
        """Seconds of full prefill as the mean over the prompts, measured `rounds` times."""
        times = [statistics.mean(self._time(prompt, None) for prompt in self._prompts) for _ in range(rounds + 1)]
        return times[1:]  # the first warms up

    def cost(self, full: float, rounds: int) -> CostModel:
        """Times to move and to compute one token of one layer. `full` is the seconds of full prefill.

        The least of several times counts: it is nearest to what the machine can do, as other programs can only add time.
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
    """A store of its own for the prompts' chunks, which has all of them on one tier."""
    budget = bench.store.tier(kind.name).budget if kind.copies else 0
    memory = ChunkStore(None, host_budget=NO_LIMIT, device_budget=budget, device=bench.adapter.device)
    try:
        for key in dict.fromkeys(bench.key(i) for p in prompts for i in p.chunk_ids if i):
            chunk = bench.store.whole(key)
            if chunk is None:
                continue  # the first timed prefill raises an error that says so
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
    """Have a chunk copied to the tier of this kind. Returns whether it is there now."""
    for _ in range(2):
        reader = store.open(key)
        if reader is None:
            return False
        with reader:
            if reader.kind is kind:
                return True
            reader.promote()
    return False
