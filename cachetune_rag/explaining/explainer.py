"""Reads a prompt as a request would, looks at all that can be seen of it, and on wish compares it with full prefill."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachetune_rag.chunks.recognition import StoreRecognizer
from cachetune_rag.explaining.attended import Looked, QueryProbe, top_places
from cachetune_rag.explaining.explanation import AnswerToken as JudgedToken
from cachetune_rag.explaining.explanation import (
    Attended,
    Attention,
    ExplainedAnswer,
    ExplainedChunk,
    Explanation,
    NearText,
    Part,
    PredictedDivergence,
    TrueDivergence,
)
from cachetune_rag.explaining.near_texts import near_misses, nearest
from cachetune_rag.explaining.parts import parts_of
from cachetune_rag.explaining.reasons import Reasons
from cachetune_rag.explaining.spelling import Spelling
from cachetune_rag.measuring.bench import Bench
from cachetune_rag.measuring.calibration.saved import SavedCalibrations
from cachetune_rag.measuring.divergence import Divergence
from cachetune_rag.measuring.teacher import rewind
from cachetune_rag.reuse.account import FATES, Account, ChunkAccount, Fate, Outcome
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.reuse.state import PrefillState
from cachetune_rag.selection import get_selector
from cachetune_rag.selection.bound import SignOnly
from cachetune_rag.text.prompts.prompt import Prompt

MOST_ATTENDED = 20
"""Tokens that are named: those that the query attends to most."""
MUCH = 100
"""Tokens outside of chunks from which on stored texts are looked for in them."""
SECONDS = 4.0
"""The longest that the store's texts are searched for one explanation, however many chunks it missed. A person asked for it."""
LEAST_SECONDS = 0.5
"""Of this, what is left for texts outside of chunks."""
_AROUND = 6  # tokens shown on either side of an attended one


@dataclass(frozen=True, eq=False)
class _Read:
    """A prompt that was read, with what was seen of it. `error` is the expected error of each token."""

    state: PrefillState
    looked: Looked
    error: NDArray[np.float32] | None
    answer: tuple[int, ...]


class Explainer:
    """Explains prompts on one engine. Nothing of it counts as a request, and nothing in the store is changed.

    Args:
        bench: measures on the engine.
        recognizer: knows the stored texts.
        calibrations: what was calibrated.
        model_name: path or hub id of the model.
    """

    def __init__(
        self,
        bench: Bench,
        recognizer: StoreRecognizer,
        calibrations: SavedCalibrations,
        model_name: str,
    ):
        self._bench, self._recognizer, self._calibrations = bench, recognizer, calibrations
        self._model_name = model_name
        self._reasons = Reasons(bench.store, bench.lead_ins)

    def explain(self, prompt: Prompt, config: ReuseConfig, *, question: str, compare: bool, tokens: int) -> Explanation:
        """What becomes of a prompt.

        Args:
            prompt: the prompt.
            config: what is recomputed.
            question: the query as it was given.
            compare: whether the whole prompt is computed as well, and compared.
            tokens: most tokens of an answer.
        """
        bench, spelling = self._bench, Spelling(self._bench.tokenizer, prompt.ids)
        accounts: list[Account] = []
        state = bench.prefill(prompt, config, accounts.append)
        account = accounts[-1]
        read = self._look(state, account, tokens)
        full = None if not compare else self._look(bench.prefill(prompt, None), None, tokens)
        parts = parts_of(prompt, account, spelling)
        until = time.monotonic() + SECONDS
        missed = [prompt.chunk_texts[each.number] for each in account.chunks if each.outcome is Outcome.MISSED]
        near = nearest(self._recognizer, missed, until)
        self._reasons.search(missed, until)
        return Explanation(
            question=question,
            model=self._model_name,
            source="engine",
            report=_plain(state.report.as_dict()),
            parts=tuple(_measured(part, account, read, full) for part in parts),
            chunks=tuple(self._chunk(each, prompt, near) for each in sorted(account.chunks, key=lambda c: c.number)),
            near=self._near(parts, until),
            attention=_attention(read.looked, account, prompt, spelling),
            predicted=self._predicted(read, account, prompt, config),
            divergence=None if full is None else self._divergence(full, read),
            reuse=self._answer(read, tokens),
            full=None if full is None else self._answer(full, tokens),
        )

    def _look(self, state: PrefillState, account: Account | None, tokens: int) -> _Read:
        """Decode the answer behind a prompt, rewind it, and watch its query."""
        bench = self._bench
        answer = bench.continuation(state, tokens)
        with bench.model.lock.reserved(), bench.model.lock:
            bench.lifetime.check()
            probe = QueryProbe(bench.adapter, state)
            error = None if account is None else probe.expected_error(account)
            return _Read(state, probe.look(), error, answer)

    def _predicted(self, read: _Read, account: Account, prompt: Prompt, config: ReuseConfig) -> PredictedDivergence:
        """What is known of the divergence without full prefill."""
        left, ratio = _left(read, account), self._calibrations.ratio(config.selector)
        predictor, sign = self._calibrations.predictor(config.selector), read.state.report.sign
        if predictor is not None and sign is None and get_selector(config.selector).predicts:
            # Read once more: to take the sign costs time, which must not be among that of the prompt as a request reads it.
            sign = self._bench.prefill(prompt, replace(config, finder=SignOnly())).report.sign
        if predictor is None or sign is None:
            return PredictedDivergence(left, ratio)
        (found,) = replace(predictor, ratios=(read.state.report.ratio,)).predict([sign])
        return PredictedDivergence(left, ratio, found.kl, found.top1, predictor.share)

    def _divergence(self, full: _Read, reuse: _Read) -> TrueDivergence:
        """Full prefill's answer, token by token, behind both prompts."""
        target, length = full.answer, len(full.state.prompt.ids)
        logits = []
        for each in (full, reuse):
            logits.append(self._bench.logits_behind(each.state, target))
            rewind(each.state.cache, length)
        found = Divergence.of(*logits)
        spelling = Spelling(self._bench.tokenizer, target)
        judged = (
            JudgedToken(spelling.text(at, at + 1), kl, same)
            for at, (kl, same) in enumerate(zip(found.kl, found.same, strict=True))
        )
        return TrueDivergence(found.kl[0], found.mean_kl, found.top1, tuple(judged))

    def _answer(self, read: _Read, tokens: int) -> ExplainedAnswer:
        text = self._bench.tokenizer.decode(read.answer, skip_special_tokens=True)
        report, count = read.state.report, len(read.answer)
        return ExplainedAnswer(text, count, count < tokens, report.ttft, report.timings)

    def _chunk(self, chunk: ChunkAccount, prompt: Prompt, near: Mapping[str, NearText]) -> ExplainedChunk:
        number = chunk.number
        text, document = prompt.chunk_texts[number], prompt.chunk_documents[number]
        return ExplainedChunk(
            number,
            chunk.outcome.value,
            self._reasons.why(chunk, prompt.chunk_ids[number], text),
            document or self._reasons.document_of(chunk.key),
            "" if chunk.key is None else str(chunk.key)[:12],
            chunk.tier,
            chunk.codec,
            near.get(text) if chunk.outcome is Outcome.MISSED else None,
        )

    def _near(self, parts: Sequence[Part], until: float) -> tuple[NearText, ...]:
        """Stored texts that stand outside of chunks in another form."""
        outside = [part for part in parts if part.kind != "chunk"]
        if sum(part.tokens for part in outside) < MUCH:
            return ()
        seconds = max(LEAST_SECONDS, until - time.monotonic())
        return near_misses(
            self._recognizer, seconds, "\n".join(run.text or "" for part in outside for run in part.runs)
        )


def _plain(value: Any) -> Any:
    """The same with lists for tuples, as JSON gives it back."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _measured(part: Part, account: Account, reuse: _Read, full: _Read | None) -> Part:
    """A part with what the probes say of its tokens."""
    tokens = slice(part.start, part.start + part.tokens)
    left = None
    if part.kind == "chunk" and reuse.error is not None and (total := float(reuse.error.sum())) > 0:
        reused = account.fates[tokens] == FATES.index(Fate.REUSED)
        left = float(reuse.error[tokens][reused].sum()) / total
    return replace(
        part,
        attention=float(reuse.looked.attention[tokens].sum()),
        attention_full=None if full is None else float(full.looked.attention[tokens].sum()),
        expected_error=left,
    )


def _left(read: _Read, account: Account) -> float | None:
    """Share of the expected error that is left in reused tokens."""
    if not read.state.report.reused:
        return 0.0
    if read.error is None or not (total := float(read.error.sum())) > 0:
        return None
    return float(read.error[account.fates == FATES.index(Fate.REUSED)].sum()) / total


def _attention(looked: Looked, account: Account, prompt: Prompt, spelling: Spelling) -> Attention:
    first = float(looked.attention[0])
    rest = max(1e-9, 1 - first)
    most = []
    for place in top_places(looked.attention, prompt.spans, MOST_ATTENDED):
        inside = next((span.chunk for span in prompt.spans if span.start <= place < span.end), None)
        after = min(len(prompt.ids), place + 1 + _AROUND)
        most.append(
            Attended(
                place,
                float(looked.attention[place]) / rest,
                FATES[account.fates[place]].value,
                spelling.text(max(0, place - _AROUND), place),
                spelling.text(place, place + 1),
                spelling.text(place + 1, after),
                inside,
            )
        )
    return Attention(looked.watched, first, tuple(most))
