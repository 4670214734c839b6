"""What a million requests cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from simulation.measured import Times
from simulation.replicas import REMOTE, Fleet, Outcome
from simulation.sizes import Size

HOURS = 730.0
"""Of a month."""
_LEAD_INS = 4


@dataclass(frozen=True)
class Prices:
    """In dollars. These are assumptions, not measurements.

    Attributes:
        gpu_hour: a GPU with its share of the machine: processor, memory and disk.
        gigabyte_month: a GB in the remote tier for a month.
        thousand_reads: a thousand requests to it.
        busy: how busy GPUs may be on average.
    """

    gpu_hour: float
    gigabyte_month: float
    thousand_reads: float
    busy: float


@dataclass(frozen=True)
class Cost:
    """Of a million requests, in dollars, and the GPU hours in it.

    Attributes:
        gpu_hours: that answering takes.
        gpu: what these cost.
        reads: requests to the remote tier.
        storage: its share of what the corpus' KV costs a month.
        precompute: its share of computing what changes in the corpus.
    """

    gpu_hours: float
    gpu: float
    reads: float = 0.0
    storage: float = 0.0
    precompute: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.gpu + self.reads + self.storage + self.precompute

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self) | {"total": self.total}


def answering(outcome: Outcome, prices: Prices) -> Cost:
    """GPUs alone."""
    hours = outcome.busy * 1e6 / 3600 / prices.busy
    return Cost(hours, hours * prices.gpu_hour)


def precompute_hours(chunks: float, size: Size, times: Times, context: int) -> float:
    """GPU hours for so many chunks, each behind four lead-ins, at the speed of full prefill."""
    return chunks * size.tokens * _LEAD_INS * times.full / context / 3600


def reusing(
    outcome: Outcome, fleet: Fleet, remote: Size, prices: Prices, precompute: float, corpus_chunks: int
) -> Cost:
    """GPUs, the remote tier, and keeping it true.

    Args:
        outcome: of the simulation.
        fleet: what was simulated.
        remote: a chunk in the remote tier.
        prices: what things cost.
        precompute: GPU hours a month for documents that change.
        corpus_chunks: chunks that are kept there.
    """
    gpu = answering(outcome, prices)
    per_month = fleet.rate * fleet.replicas * 3600 * HOURS / 1e6
    reads = outcome.share(REMOTE) * fleet.shown * 1e6 * remote.reads * prices.thousand_reads / 1000
    storage = corpus_chunks * remote.whole / 1e9 * prices.gigabyte_month / per_month
    return Cost(gpu.gpu_hours, gpu.gpu, reads, storage, precompute * prices.gpu_hour / per_month)
