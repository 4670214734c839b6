"""Runs one record through the engine under every setting and measures it against full prefill of the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from cachetune_rag import CacheTune, Document
from cachetune_rag.assembly import PrefillState
from cachetune_rag.decoding import decode, prepare
from cachetune_rag.prompt import Prompt

from .measures import distance, exact_match, f1
from .records import Dataset, Record
from .rows import Key, Row, key_of
from .settings import NOTHING, Setting

ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Reference:
    """Full prefill of a record."""

    prompt: Prompt
    logits: Tensor
    answer: str | None


class Engines:
    """Engines of one model, made when first needed: one a corpus of lead-ins, lead-in and codec.

    Args:
        model, tokenizer: as for `CacheTune`.
        options: further arguments of `CacheTune`.
    """

    def __init__(self, model: Any, tokenizer: Any, **options: Any):
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self._made: dict[tuple[str, str, str], CacheTune] = {}

    def get(self, dataset: Dataset, lead_in: str, codec: str) -> CacheTune:
        """An engine that holds no chunks. "auto" lead-ins are chosen already, from texts that no record holds."""
        key = (dataset.digest, lead_in, codec)
        if key not in self._made:
            options = {"lead_in": lead_in, "codec": codec, "chunk_separator": dataset.separator, **self._options}
            engine = CacheTune(self._model, self._tokenizer, None, **options)
            if lead_in == "auto":
                engine.lead_ins.offer([engine.prompts.encode(text) for text in dataset.leads], indexing=True)
                if engine.lead_ins.undecided:  # it would go on to choose from the records themselves
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
        engines: of the model.
        dataset: the records' layout, and the texts that lead-ins are taken from.
        settings: what to measure, those of one lead-in and codec together.
        answer_ratios: at which ratios answers are generated, where a record has accepted ones.
    """

    def __init__(
        self, engines: Engines, dataset: Dataset, settings: Sequence[Setting], answer_ratios: Sequence[float] = ()
    ):
        self._engines, self._dataset, self._settings = engines, dataset, settings
        self._answer_ratios = frozenset(answer_ratios)

    def run(self, record: Record, known: dict[Key, Row]) -> Iterator[Row]:
        """The rows of a record that are not known yet, one by one."""
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
                # What a probe costs depends on whether the prefix is known already: from here on it is.
                engine.prefill(prompt=reference.prompt, selector=NOTHING, ratio=0.0)
                for setting in settings:
                    yield from self._rows(engine, record, reference, setting, known)
            finally:
                engine.remove(record.name)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _reference(self, engine: CacheTune, record: Record) -> Reference:
        prompt = self._dataset.prompt(engine.prompts, record)
        state = engine.full_prefill(prompt=prompt)
        logits = target_logits(engine, state, record.target)
        answer = greedy_answer(engine, state) if record.answers and self._answer_ratios else None
        return Reference(prompt, logits, answer)

    def _done(self, record: Record, setting: Setting, known: dict[Key, Row]) -> bool:
        plain = known.get(self._key(record, setting, "ratio"))
        return plain is not None and (plain["probed"] == 0 or self._key(record, setting, "compute") in known)

    def _key(self, record: Record, setting: Setting, budget: str) -> Key:
        return key_of(self._head(record, setting, budget))

    def _head(self, record: Record, setting: Setting, budget: str) -> Row:
        named = {"set": self._dataset.name, "record": record.name, "digest": record.digest, "source": record.source}
        return {**named, **asdict(setting), "budget": budget}

    def _rows(
        self, engine: CacheTune, record: Record, reference: Reference, setting: Setting, known: dict[Key, Row]
    ) -> Iterator[Row]:
        """A row at the ratio as it is, and, if choosing the tokens took compute, one that pays for that from its budget."""
        plain = known.get(self._key(record, setting, "ratio"))
        if plain is None:
            plain = self._measure(engine, record, reference, setting, "ratio", setting.ratio)
            yield plain
        if plain["probed"]:
            total = plain["chunk_tokens"] * engine.adapter.num_layers
            ratio = equal_compute_ratio(setting.ratio, plain["probed"], total)
            yield self._measure(engine, record, reference, setting, "compute", ratio)

    def _measure(
        self, engine: CacheTune, record: Record, reference: Reference, setting: Setting, budget: str, ratio: float
    ) -> Row:
        state = engine.prefill(prompt=reference.prompt, selector=setting.selector, ratio=ratio)
        report = state.report
        if report.missed:
            raise RuntimeError(
                f"{record.name}: {report.missed} chunk tokens were not in the store any more: give it more --host-budget."
            )
        found = distance(reference.logits, target_logits(engine, state, record.target), record.target)
        chunk_tokens, layers = report.reused + report.recomputed, engine.adapter.num_layers
        row = self._head(record, setting, budget) | {
            "ratio_passed": ratio,
            "prompt_tokens": report.prompt_tokens,
            "chunk_tokens": chunk_tokens,
            "recomputed": report.recomputed,
            "probed": report.probed,
            "compute": (report.recomputed * layers + report.probed) / (chunk_tokens * layers),
            **asdict(found),
        }
        if reference.answer is not None and setting.ratio in self._answer_ratios:
            answer = greedy_answer(engine, state)
            row |= {
                "f1": f1(answer, record.answers),
                "em": exact_match(answer, record.answers),
                "f1_full": f1(answer, [reference.answer]),
                "em_full": exact_match(answer, [reference.answer]),
            }
        return row


def equal_compute_ratio(ratio: float, probed: int, total: int) -> float:
    """The ratio to ask for so that recompute and probe together cost ratio * total.

    Args:
        ratio: share of the compute of all chunk tokens.
        probed: token-layers that choosing the tokens costs.
        total: token-layers of all chunk tokens.

    Returns:
        0 where the probe alone costs more: such a selector can't be had for this budget, and nothing is recomputed.
    """
    return max(0.0, ratio - probed / total)


def target_logits(engine: CacheTune, state: PrefillState, target: Sequence[int]) -> Tensor:
    """Logits that predict each target token, given the prompt and the target tokens before it: [target tokens, vocab].

    The state's cache is left as it was.
    """
    if len(target) == 1:
        return state.logits
    ids = torch.tensor(target[:-1], device=engine.adapter.device)
    after = engine.adapter.forward(ids, state.cache, keep=len(ids))
    state.cache.crop(-len(ids))
    return torch.cat((state.logits, after))


def greedy_answer(engine: CacheTune, state: PrefillState) -> str:
    """What the model answers, its likeliest token each time."""
    adapter = engine.adapter
    plan = prepare(
        adapter.model, engine.tokenizer, list(state.prompt.ids), max_new_tokens=ANSWER_TOKENS, do_sample=False
    )
    stream = plan.text_stream()
    tokens = decode(
        lambda t: adapter.forward(torch.tensor([t], device=adapter.device), state.cache), plan, state.logits
    )
    return "".join([*map(stream.push, tokens), stream.finish()]).strip()
