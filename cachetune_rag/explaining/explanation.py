"""What `CacheTune.explain` finds: plain values with a JSON form, which a page, a script or a test can read."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, get_args, get_origin, get_type_hints

from cachetune_rag.errors import ConfigError

KINDS = ("prefix", "chunk", "between", "query")
"""Of parts."""
FATES = ("computed", "kept", "reused", "recomputed", "skipped", "missed")
"""Of tokens; `cachetune_rag.reuse.account.Fate` says what they mean. This module loads no model, so they stand here again."""
FORMAT = 1
"""Of the JSON form. It grows when a field's meaning changes."""


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of the prompt with one fate.

    Attributes:
        fate: "computed", "kept", "reused", "recomputed", "skipped" or "missed" (`cachetune_rag.reuse.account.Fate`).
        tokens: how many they are.
        text: what they spell; None where that isn't known.
    """

    fate: str
    tokens: int
    text: str | None = None


@dataclass(frozen=True)
class Part:
    """A stretch of the prompt: what stands before the chunks, a chunk, what stands between two, or what stands behind them.

    Attributes:
        kind: "prefix", "chunk", "between" or "query". In a prompt without chunks, all of it is the query.
        start: place of its first token.
        runs: its tokens.
        chunk: number of the chunk in the request, from 0.
        attention: share of the query's attention that its tokens get, from 0 to 1.
        attention_full: the same behind full prefill.
        expected_error: what is left in it of the prompt's expected error, as a share of what there was in the whole prompt.
    """

    kind: str
    start: int
    runs: tuple[Run, ...]
    chunk: int | None = None
    attention: float | None = None
    attention_full: float | None = None
    expected_error: float | None = None

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return sum(run.tokens for run in self.runs)

    def count(self, fate: str) -> int:
        """How many of its tokens have a fate."""
        return sum(run.tokens for run in self.runs if run.fate == fate)


@dataclass(frozen=True)
class NearText:
    """The stored text that is most like one that was not found, and where the two begin to differ.

    Attributes:
        change: what was changed: a key of `REASONS` in `cachetune_rag.text.recognising.text_changes`.
        meaning: the same as a sentence.
        at: characters from the beginning that are the same in both.
        before: the last of these characters.
        shown, stored: what follows in the prompt, and in the stored text. "" is the text's end.
    """

    change: str
    meaning: str
    at: int
    before: str
    shown: str
    stored: str


@dataclass(frozen=True)
class ExplainedChunk:
    """A chunk of the request.

    Attributes:
        number: in the request, from 0.
        outcome: "stored", "missed", "damaged", "unreadable", "timed out" or "empty" (`cachetune_rag.reuse.account.Outcome`).
        why: the outcome as a sentence, with its reason.
        document: the document that the request names for it, or that holds it.
        key: its chunk key, shortened.
        tier, codec: where its rows came from, and how they are stored there; "" where it isn't stored.
        near: the stored text that is most like it; None where it is stored, or no text is like it.
    """

    number: int
    outcome: str
    why: str
    document: str | None = None
    key: str = ""
    tier: str = ""
    codec: str = ""
    near: NearText | None = None


@dataclass(frozen=True)
class Attended:
    """A token that the query attends to much.

    Attributes:
        place: in the prompt.
        share: of the query's attention, without what the prompt's first token gets.
        fate: what became of it.
        before, text, after: what it spells, and what stands around it.
        chunk: number of its chunk; None outside of chunks.
    """

    place: int
    share: float
    fate: str
    before: str
    text: str
    after: str
    chunk: int | None = None


@dataclass(frozen=True)
class Attention:
    """What the query attends to: the mean over all layers, heads and watched tokens.

    Attributes:
        watched: how many of the prompt's last tokens were watched.
        first_token: share that the prompt's first token gets, which in most models serves as an attention sink.
        most: the tokens of chunks that get most of the rest, the first ones first; any tokens, where the prompt has no chunks.
    """

    watched: int
    first_token: float
    most: tuple[Attended, ...]


@dataclass(frozen=True)
class PredictedDivergence:
    """What can be said of the divergence without a full prefill.

    Attributes:
        left: share of the prompt's expected error that is left once the chosen tokens are recomputed, from 0 to 1;
            None where no chunk has deviations.
        calibrated: the ratio that `calibrate` saved for this selector; None where there is none.
        kl, top1: what `calibrate` lets expect of the first token of a request with such a sign: the most KL, and the probability that full prefill,
            too, finds it the likeliest. None where it fitted nothing, or the selector scores nothing.
        share: the share of requests for which `kl` is expected to hold.
    """

    left: float | None
    calibrated: float | None
    kl: float | None = None
    top1: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class AnswerToken:
    """A token of full prefill's answer, judged behind both prompts (teacher forcing).

    Attributes:
        text: what it spells.
        kl: KL in nats.
        same: whether reuse finds the same token the likeliest.
    """

    text: str
    kl: float
    same: bool


@dataclass(frozen=True)
class TrueDivergence:
    """How far reuse is from full prefill of the same prompt.

    Attributes:
        first_kl: KL at the first token of the answer, in nats.
        mean_kl: KL a token, over full prefill's answer.
        top1: share of these tokens at which both find the same token the likeliest.
        tokens: what was compared.
    """

    first_kl: float
    mean_kl: float
    top1: float
    tokens: tuple[AnswerToken, ...]


@dataclass(frozen=True)
class ExplainedAnswer:
    """An answer, and the time to its prompt's logits.

    Attributes:
        text: the answer; None where it isn't known.
        tokens: how many tokens it has.
        ended: whether it came to its end, and was not cut off.
        ttft: seconds to the logits of its first token.
        timings: where they went, as `Report.timings` says it.
    """

    text: str | None
    tokens: int
    ended: bool
    ttft: float | None
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Explanation:
    """What became of one prompt.

    Attributes:
        question: the query as it was given; "" where the request was a finished prompt.
        model: path or hub id of the model.
        source: "engine", or "server" where it was made from a server's response, which has less to show.
        report: the request's report, as `Report.as_dict` has it.
        parts: the whole prompt; empty where it isn't known.
        chunks: the request's chunks.
        near: stored texts that the prompt shows in another form outside of its chunks, so that they were not found.
        attention, predicted, divergence: see these; None where they were not looked at.
        reuse: the answer with reuse.
        full: the answer behind full prefill; None without `compare`.
        left: inside vLLM, why the request was left to vLLM; "" if it wasn't.
        format: of the JSON form.
    """

    question: str
    model: str
    source: str
    report: dict[str, Any]
    parts: tuple[Part, ...] = ()
    chunks: tuple[ExplainedChunk, ...] = ()
    near: tuple[NearText, ...] = ()
    attention: Attention | None = None
    predicted: PredictedDivergence | None = None
    divergence: TrueDivergence | None = None
    reuse: ExplainedAnswer | None = None
    full: ExplainedAnswer | None = None
    left: str = ""
    format: int = FORMAT

    def count(self, fate: str) -> int:
        """How many tokens of the prompt have a fate."""
        return sum(part.count(fate) for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        """What `as_dict` gave, perhaps by way of JSON.

        Raises:
            ConfigError: it is no such thing, or was made by another release.
        """
        if not isinstance(given, Mapping) or given.get("format") != FORMAT:
            found = given.get("format") if isinstance(given, Mapping) else type(given).__name__
            raise ConfigError(
                f"this is no explanation that this release can read (format {found!r:.40}, and it reads {FORMAT}): make it again with "
                "`cachetune explain --json`."
            )
        try:
            made: Self = _made(cls, given)
            _check(made)
            return made
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"this is no explanation: {error}. Make it again with `cachetune explain --json`."
            ) from error


def _check(e: Explanation) -> None:
    """Refuse values that no page can show.

    Raises:
        TypeError, ValueError: names one.
    """
    for part in e.parts:
        if part.kind not in KINDS:
            raise ValueError(f"a part is of kind {part.kind!r:.40}, and there are {', '.join(KINDS)}")
        for run in part.runs:
            if run.fate not in FATES:
                raise ValueError(f"a fate is {run.fate!r:.40}, and there are {', '.join(FATES)}")
            if not isinstance(run.tokens, int):
                raise TypeError(f"a run has {run.tokens!r:.40} tokens, which is no number")
    for name in ("ratio", "ttft", "prompt_tokens", "reused", "recomputed", "missed", "skipped", "prefix_kept"):
        if not isinstance(e.report.get(name, 0), int | float):
            raise TypeError(f"the report's {name} is {e.report[name]!r:.40}, which is no number")


def _made(kind: Any, given: Any) -> Any:
    """A value of a field's type, from its JSON form."""
    origin = get_origin(kind)
    if origin is types.UnionType:
        return None if given is None else _made(next(each for each in get_args(kind) if each is not type(None)), given)
    if origin is tuple:
        return tuple(_made(get_args(kind)[0], each) for each in given)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        make: Any = kind
        return make(**{name: _made(hints[name], value) for name, value in given.items()})
    return given
