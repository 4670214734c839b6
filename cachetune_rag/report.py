"""Reports: what a request or a precompute job did."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from cachetune_store.tier_kinds import rank


@dataclass(frozen=True)
class Report:
    """What happened to one request.

    Attributes:
        prompt_tokens: tokens of the whole prompt.
        reused: chunk tokens whose stored KV was used as it is.
        recomputed: chunk tokens that are stored but were computed again.
        missed: chunk tokens that were not in the store; they were computed exactly, and their chunks are stored afterwards.
        bytes_read: bytes of KV read, by tier.
        ratio: share of the stored chunk tokens that was asked to be recomputed.
        selector: which selector chose them.
        ttft: seconds from the request to its first token (for `prefill`: to its logits).
        timings: seconds by phase, once the prompt is built. lookup: finding and opening its chunks. select: choosing which tokens to
            recompute, including a selector's own forward. load: putting reused rows in their places; on a GPU, where this happens
            during the computation, the time that the computation waited for them. compute: the forward over the recomputed tokens.
            launch (GPU): the time until the device began that forward, and until the host saw that it was done. choose: choosing
            the first token of an answer.
        prefix_kept: tokens at the prompt's beginning whose KV was kept from an earlier prompt with the same beginning; at most
            those before the first stored chunk.
        damaged: chunks found damaged, set aside and computed instead.
        unreadable: chunks that the system refused to read (an I/O error, no permission), computed instead.
        timed_out: chunks that could not be read from the store's disk within `read_timeout`, computed instead. Until the disk answers
            again, this counts every chunk that isn't in host memory.
        storing: missed chunks that will be stored when the model has time. `stats().storing` counts those that still wait,
            `stats().unstored` those that could not be stored.
        unstored: missed chunks that are not stored: by `prefill`, because they could not be (no room, no permission, no time);
            behind an answer, because too many wait already, or the engine is being closed.
        recognised: chunks that were found in plain text (see `CacheTune.prompt_from_text`).
        retrieved: tokens of the texts that the caller's retriever returned; 0 if the caller did not pass them.
        full: True for full prefill, the reference, which reuses nothing.
        request_id: names the request in logs and spans.
        probed: token-layers that the selector ran in order to choose. One token through one layer counts as one; through a part of
            a layer, as that part's share of the layer's weights. The rest of the request ran `computed` times the model's layers.
        skipped: recomputed tokens whose stored KV was not read (except in layers that a selector looked at).
    """

    prompt_tokens: int
    reused: int
    recomputed: int
    missed: int
    bytes_read: dict[str, int]
    ratio: float
    selector: str
    ttft: float
    timings: dict[str, float] = field(default_factory=dict)
    prefix_kept: int = 0
    damaged: int = 0
    recognised: int = 0
    full: bool = False
    request_id: str = ""
    probed: int = 0
    skipped: int = 0
    unreadable: int = 0
    timed_out: int = 0
    unstored: int = 0
    storing: int = 0
    retrieved: int = 0

    @property
    def found_share(self) -> float:
        """Share of the retrieved tokens that was found in the store, from 0 to 1. If the caller did not pass what was retrieved, it is
        the share of the prompt's tokens."""
        return share_found(self.reused + self.recomputed, self.retrieved or self.prompt_tokens)

    @property
    def slowest_tier(self) -> str:
        """The slowest tier that rows were read from; "none" if there was none."""
        return max((tier for tier, read in self.bytes_read.items() if read), key=rank, default="none")

    @property
    def computed(self) -> int:
        """Prompt tokens that went through the model: everything but `reused` and `prefix_kept`."""
        return self.prompt_tokens - self.reused - self.prefix_kept

    def as_dict(self) -> dict[str, Any]:
        """The fields and `found_share`, for JSON."""
        return {**dataclasses.asdict(self), "found_share": self.found_share}

    def __str__(self) -> str:
        if self.full:
            return f"{self.prompt_tokens} prompt tokens, full prefill, first token after {_seconds(self.ttft)}"
        read = " + ".join(f"{_size(n)} {tier}" for tier, n in self.bytes_read.items() if n) or "nothing"
        faults = {
            "damaged chunks set aside": self.damaged,
            "chunks unreadable": self.unreadable,
            "chunks not read in time": self.timed_out,
            "chunks not stored": self.unstored,
        }
        told = "".join(f", {count} {what}" for what, count in faults.items() if count)
        found = f", {self.found_share:.0%} of {self.retrieved} retrieved found" if self.retrieved else ""
        return (
            f"{self.prompt_tokens} prompt tokens: {self.reused} reused, {self.recomputed} recomputed, {self.missed} missed{found} "
            f"({self.selector}, r={self.ratio:g}); read {read}; first token after {_seconds(self.ttft)}{told}"
        )


@dataclass(frozen=True)
class PrecomputeSummary:
    """What a precompute job did.

    Attributes:
        documents: documents seen.
        chunks: chunks computed and stored.
        skipped: chunks that were stored already, or occur twice in the job.
        tokens: tokens of the computed chunks.
        bytes: bytes stored for them.
        seconds: wall time.
        lead_ins: how many lead-ins each chunk was computed behind; with several, their mean was stored.
    """

    documents: int
    chunks: int
    skipped: int
    tokens: int
    bytes: int
    seconds: float
    lead_ins: int = 1

    @property
    def tokens_per_second(self) -> float:
        """Computed tokens over wall time."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The fields and the speed, for JSON."""
        return {**dataclasses.asdict(self), "tokens_per_second": self.tokens_per_second}

    def __str__(self) -> str:
        return (
            f"{self.documents} documents: {self.chunks} chunks computed, {self.skipped} stored before; {self.tokens} tokens "
            f"in {_seconds(self.seconds)} ({self.tokens_per_second:.0f} tokens/s), {_size(self.bytes)} stored"
            f"{f', mean over {self.lead_ins} lead-ins' if self.lead_ins > 1 else ''}"
        )


def share_found(found: int, tokens: int) -> float:
    """Found tokens as a share of all. Never above 1, although a text that the prompt shows twice is found twice."""
    return min(1.0, found / tokens) if tokens else 0.0


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def _size(value: int) -> str:
    size = float(value)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
