"""Runs a record through the engine with every setting, and compares it with full prefill of the same tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, islice
from typing import Any

from torch import Tensor

from cachetune_rag import CacheTune, Document
from cachetune_rag.report import Report
from cachetune_rag.reuse.state import PrefillState
from cachetune_rag.text.prompts.prompt import Prompt

from .answers import ANSWER_TOKENS, Answer, begin, finish, follow, target_logits
from .measures import behind, distance, exact_match, f1
from .records import Dataset, Record
from .rows import Key, Row, key_of
from .settings import NOTHING, Setting


@dataclass(frozen=True)
class Reference:
    """Full prefill of a record."""

    prompt: Prompt
    logits: Tensor
    answer: Answer | None


class Engines:
    """Engines of one model, made when they are first needed: one for each corpus of lead-ins, lead-in and codec.

    Args:
        model, tokenizer: as for `CacheTune`.
        options: further arguments of `CacheTune`.
    """

    def __init__(self, model: Any, tokenizer: Any, **options: Any):
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self._made: dict[tuple[str, str, str], CacheTune] = {}

    def get(self, dataset: Dataset, lead_in: str, codec: str) -> CacheTune:
        """An engine without chunks. "auto" lead-ins have been chosen already, from texts that are in no record."""
        key = (dataset.digest, lead_in, codec)
        if key not in self._made:
            options = {"lead_in": lead_in, "codec": codec, "chunk_separator": dataset.separator, **self._options}
            engine = CacheTune(self._model, self._tokenizer, None, **options)
            if lead_in == "auto":
                engine.lead_ins.choose_from([engine.prompts.encode(text) for text in dataset.leads], indexing=True)
                if engine.lead_ins.undecided:  # otherwise lead-ins would be chosen from the records themselves
                    raise ValueError(
                        f"the texts of {dataset.name} that are kept for lead-ins are too few for an engine to choose from: give "
                        "more documents, or measure with --lead-ins first_token alone."
                    )
            self._made[key] = engine
        return self._made[key]

    def close(self) -> None:
        """Close all."""
        for engine in self._made.values():
            engine.close()


class Evaluator:
    """Measures the records of one set.

    Args:
        engines: the model's engines.
        dataset: says how the records are laid out, and has the texts that lead-ins are taken from.
        settings: what to measure. Those of one lead-in and codec stand together.
        answer_ratios: the ratios at which answers are generated, for records that have accepted ones.
        together: for how many settings the target runs through the model in one forward. On a GPU this is several times faster than one
            by one. It takes twice the memory of that many prompts.
        stored: see `partly_stored`.
        answer_tokens: most tokens of an answer.
        steps_end: of an answer, what stands behind the last of these marks is scored; None for all of it.
    """

    def __init__(
        self,
        engines: Engines,
        dataset: Dataset,
        settings: Sequence[Setting],
        answer_ratios: Sequence[float] = (),
        together: int = 1,
        stored: float = 1.0,
        answer_tokens: int = ANSWER_TOKENS,
        steps_end: str | None = None,
    ):
        self._engines, self._dataset, self._settings, self._together = engines, dataset, settings, together
        self._answer_ratios, self._stored = frozenset(answer_ratios), stored
        self._answer_tokens, self._steps_end = answer_tokens, steps_end

    def run(self, record: Record, known: dict[Key, Row]) -> Iterator[Row]:
        """Measure and yield those rows of a record that are not known yet."""
        reference: Reference | None = None
        for (lead_in, codec), group in groupby(self._settings, key=lambda s: (s.lead_in, s.codec)):
            settings = [s for s in group if not self._done(record, s, known)]
            if not settings:
                continue
            engine = self._engines.get(self._dataset, lead_in, codec)
            if reference is None:
                reference = self._reference(engine, record)
            engine.precompute(Document(record.name, list(record.chunks)))
            try:
                # A probe computes less once the prefix is kept from an earlier prompt, as it is from here on.
                engine.prefill(prompt=reference.prompt, selector=NOTHING, ratio=0.0)
                read = (s for setting in settings for s in self._states(engine, record, reference, setting, known))
                while some := list(islice(read, self._together)):
                    targets = target_logits(engine, [state for _, state in some], record.target)
                    answers = self._answers(engine, reference, some)
                    for number, ((row, _), logits) in enumerate(zip(some, targets, strict=True)):
                        yield self._measure(record, reference, row, logits, answers.get(number))
                    del some
            finally:
                engine.remove(record.name)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _reference(self, engine: CacheTune, record: Record) -> Reference:
        prompt = partly_stored(self._dataset.prompt(engine.prompts, record), self._stored, record.digest)
        state = engine.full_prefill(prompt=prompt)
        logits = target_logits(engine, [state], record.target)[0]
        answer = None
        if record.answers and self._answer_ratios:
            answer = begin(engine, state, self._answer_tokens)
            finish(engine, [answer], 1)
        return Reference(prompt, logits, answer)

    def _done(self, record: Record, setting: Setting, known: dict[Key, Row]) -> bool:
        plain = known.get(self._key(record, setting, "ratio"))
        return plain is not None and (plain["probed"] == 0 or self._key(record, setting, "compute") in known)

    def _key(self, record: Record, setting: Setting, budget: str) -> Key:
        return key_of(self._head(record, setting, budget))

    def _head(self, record: Record, setting: Setting, budget: str) -> Row:
        named = {"set": self._dataset.name, "record": record.name, "digest": record.digest, "source": record.source}
        shape = {"form": record.form, "chunks": len(record.chunks)}
        return {**named, **asdict(setting), "budget": budget, **shape}

    def _states(
        self, engine: CacheTune, record: Record, reference: Reference, setting: Setting, known: dict[Key, Row]
    ) -> Iterator[tuple[Row, PrefillState]]:
        """The prompt read with this ratio, and the row that it begins. If choosing the tokens took compute, there is a second reading, with a
        ratio so much lower that both together compute what the ratio says.
        """
        plain = known.get(self._key(record, setting, "ratio"))
        if plain is None:
            plain, state = self._read(engine, record, reference, setting, "ratio", setting.ratio)
            yield plain, state
        if plain["probed"]:
            total = plain["chunk_tokens"] * engine.adapter.num_layers
            ratio = equal_compute_ratio(setting.ratio, plain["probed"], total)
            yield self._read(engine, record, reference, setting, "compute", ratio)

    def _read(
        self, engine: CacheTune, record: Record, reference: Reference, setting: Setting, budget: str, ratio: float
    ) -> tuple[Row, PrefillState]:
        state = engine.prefill(prompt=reference.prompt, selector=setting.selector, ratio=ratio)
        row = self._head(record, setting, budget) | {"ratio_passed": ratio, **spent(engine, record.name, state.report)}
        return row, state

    def _answers(
        self, engine: CacheTune, reference: Reference, read: Sequence[tuple[Row, PrefillState]]
    ) -> dict[int, str]:
        """The answers of those readings whose ratios are answered at, by their numbers."""
        wanted = [number for number, (row, _) in enumerate(read) if row["ratio"] in self._answer_ratios]
        if reference.answer is None or not wanted:
            return {}
        answers, _ = follow(engine, [read[number][1] for number in wanted], reference.answer)
        finish(engine, answers, len(answers))
        return {number: answer.text() for number, answer in zip(wanted, answers, strict=True)}

    def _measure(self, record: Record, reference: Reference, row: Row, logits: Tensor, answer: str | None) -> Row:
        row = row | asdict(distance(reference.logits, logits, record.target))
        if reference.answer is not None and answer is not None:
            given, full = (behind(text, self._steps_end) for text in (answer, reference.answer.text()))
            row |= {
                "answer": answer,
                "f1": f1(given, record.answers),
                "em": exact_match(given, record.answers),
                "f1_full": f1(given, [full]),
                "em_full": exact_match(given, [full]),
            }
        return row


def partly_stored(prompt: Prompt, share: float, seed: str) -> Prompt:
    """The prompt with so large a share of its chunks, at least one; the others are text like any other in it, which is computed.

    Args:
        prompt: the prompt.
        share: of its chunks.
        seed: decides which ones.
    """
    wanted = max(1, round(share * len(prompt.spans)))
    kept = set(random.Random(seed).sample(range(len(prompt.spans)), wanted))
    return replace(prompt, spans=tuple(span for number, span in enumerate(prompt.spans) if number in kept))


def equal_compute_ratio(ratio: float, probed: int, total: int) -> float:
    """The ratio with which recompute and probe together compute ratio * total.

    Args:
        ratio: share of the compute of all chunk tokens.
        probed: token-layers that choosing the tokens computes.
        total: token-layers of all chunk tokens.

    Returns:
        The ratio. 0 where the probe alone computes more than that, so that nothing can be recomputed.
    """
    return max(0.0, ratio - probed / total)


def spent(engine: CacheTune, name: str, report: Report) -> Row:
    """What reading a prompt computed, of its chunk tokens and in all layers.

    Raises:
        RuntimeError: chunks of the prompt were not in the store.
    """
    if report.missed:
        raise RuntimeError(
            f"{name}: {report.missed} chunk tokens were not in the store any more: give it more --host-budget."
        )
    chunk_tokens, layers = report.reused + report.recomputed, engine.adapter.num_layers
    return {
        "prompt_tokens": report.prompt_tokens,
        "chunk_tokens": chunk_tokens,
        "recomputed": report.recomputed,
        "probed": report.probed,
        "compute": (report.recomputed * layers + report.probed) / (chunk_tokens * layers),
    }
