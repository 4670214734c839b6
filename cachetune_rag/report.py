"""Reports: what a request or a precompute job did."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from cachetune_store.printing import plural
from cachetune_store.tier_kinds import rank


@dataclass(frozen=True)
class Predicted:
    """What is predicted for a request at one ratio.

    Attributes:
        ratio: share of the stored chunk tokens that would be recomputed.
        sign: what it is predicted from, see `Report.sign`.
        kl: the most KL of the answer's first token from full prefill, in nats.
        top1: how likely it is that full prefill, too, finds this token the likeliest.
    """

    ratio: float
    sign: float
    kl: float
    top1: float


@dataclass(frozen=True)
class Prediction:
    """Why a request with a bound took its ratio.

    Attributes:
        max_kl, min_top1: the bound; None where nothing was asked for.
        share: the share of requests that each KL in `ladder` is to hold for.
        ladder: what was predicted at each ratio that the request might have taken, by ascending ratio.
        ratio: the least of these that is predicted to keep the bound; 1.0 (full prefill, which is exact) if none is.
    """

    max_kl: float | None
    min_top1: float | None
    share: float
    ladder: tuple[Predicted, ...]
    ratio: float

    @property
    def taken(self) -> Predicted | None:
        """What was predicted at the ratio that was taken; None for full prefill."""
        return next((each for each in self.ladder if each.ratio == self.ratio), None)

    @property
    def why(self) -> str:
        """The reason, in words."""
        bounds = {"KL at most": self.max_kl, "top-1 agreement at least": self.min_top1}
        asked = " and ".join(f"{what} {value:g}" for what, value in bounds.items() if value is not None)
        taken = self.taken
        if taken is None:
            last = self.ladder[-1]
            return (
                f"full prefill, because even at r={last.ratio:g} a KL of {last.kl:.2g} and top-1 agreement of {last.top1:.2f} are predicted, and "
                f"the bound is {asked}"
            )
        return f"predicted KL {taken.kl:.2g}, top-1 agreement {taken.top1:.2f}; least ratio for {asked}"


@dataclass(frozen=True)
class ReadAgain:
    """That a prompt was read again without reuse, because the model was not sure of a token of its answer.

    Attributes:
        token: the number of that token in the answer, from 0. It and those behind it are chosen behind full prefill.
        sure: the probability of the model's likeliest token there, with reuse.
        min_sure: the least that was asked for.
        tokens: how many tokens were computed: the prompt's, and those of the answer before.
        seconds: how long it took.
    """

    token: int
    sure: float
    min_sure: float
    tokens: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"read again in full before token {self.token} of the answer, of which the model was {self.sure:.0%} sure ({self.min_sure:.0%} was "
            f"asked for), in {_seconds(self.seconds)}"
        )


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
            the first token of an answer. read_again: reading the prompt again, if that was before the first token.
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
        error_left: the sum of the selector's scores over the reused tokens: how far off the model's layers are expected to be. None where the
            selector scored nothing. Without a bound it is too small: most layers of `expected_error` then look at a part of the tokens alone
            (docs/selection.md, "The shortlist").
        sign: `error_left` times the entropy of the next token if nothing were recomputed. The larger it is, the farther from full prefill a
            request is likely to be. None where no bound was asked for, and for full prefill.
        prediction: what was predicted of the request, and the ratio that was taken for it; None where no bound was asked for.
        continued: recomputed chunk tokens that go on with a sentence, a row of a table, or a line of code which the chunk before began.
        advice: why to doubt that the answer of this prompt stays right with reuse, and what to do about it; empty for most prompts.
        read_again: that the prompt was read again without reuse in the middle of its answer, and why; None where it was not. The other figures are
            those of the first reading.
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
    error_left: float | None = None
    sign: float | None = None
    prediction: Prediction | None = None
    continued: int = 0
    advice: tuple[str, ...] = ()
    read_again: ReadAgain | None = None

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
        """The fields, `found_share`, and why a request with a bound took its ratio, for JSON."""
        fields = dataclasses.asdict(self)
        if self.prediction is not None:
            fields["prediction"]["why"] = self.prediction.why
        return {**fields, "found_share": self.found_share}

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
        why = "" if self.prediction is None else f"; {self.prediction.why}"
        return (
            f"{self.prompt_tokens} prompt tokens: {self.reused} reused, {self.recomputed} recomputed, {self.missed} missed{found} "
            f"({self.selector}, r={self.ratio:g}{why}); read {read}; first token after {_seconds(self.ttft)}{told}"
            + ("" if self.read_again is None else f"; {self.read_again}")
            + "".join(f". {words}" for words in self.advice)
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
            f"{self.documents} {plural('document', self.documents)}: {self.chunks} {plural('chunk', self.chunks)} computed, {self.skipped} stored before; "
            f"{self.tokens} {plural('token', self.tokens)} "
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
