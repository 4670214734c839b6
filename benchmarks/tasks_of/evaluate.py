"""Answers a prompt's question with full prefill and under every setting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice

from fidelity.evaluate import Engines, greedy_answers, spent, target_logits
from fidelity.measures import distance
from fidelity.rows import Key, Row, key_of
from fidelity.settings import NOTHING, Setting
from torch import Tensor

from cachetune_rag import CacheTune, Document
from cachetune_rag.text.prompts.prompt import Prompt

from .prompts import Task, TaskMaker
from .settings import FULL


class TaskRunner:
    """Runs prompts through engines of one model.

    Args:
        engines: the model's engines.
        maker: makes the prompts, and has what they have in common.
        settings: what to compare. Those of one lead-in and codec stand together.
        together: how many answers are decoded in one forward.
    """

    def __init__(self, engines: Engines, maker: TaskMaker, settings: Sequence[Setting], together: int = 1):
        self._engines, self._maker, self._settings, self._together = engines, maker, settings, together

    def run(self, task: Task, known: dict[Key, Row]) -> Iterator[Row]:
        """Measure and yield those rows of a prompt that are not known yet."""
        prompt, dataset = self._maker.prompt(task), self._maker.dataset_of(task.cell)
        wanted = [s for s in self._settings if key_of(_head(task, s)) not in known]
        if not wanted:
            return
        other = next((s for s in self._settings if s != FULL), Setting("first_token", "exact", NOTHING, 0.0))
        full = self._full(self._engines.get(dataset, other.lead_in, other.codec), task, prompt)
        if FULL in wanted:
            tokens = sum(len(chunk) for chunk in prompt.chunk_ids)
            figures = {"chunk_tokens": tokens, "recomputed": tokens, "probed": 0, "compute": 1.0}
            yield _row(task, FULL, {"prompt_tokens": len(prompt.ids), **figures}, full.answer)
        reused = [s for s in wanted if s != FULL]
        for (lead_in, codec), group in groupby(reused, key=lambda s: (s.lead_in, s.codec)):
            engine = self._engines.get(dataset, lead_in, codec)
            engine.precompute(Document(task.name, list(task.chunks)))
            try:
                # A probe computes less once the prefix is kept from an earlier prompt, as it is from here on.
                engine.prefill(prompt=prompt, selector=NOTHING, ratio=0.0)
                yield from self._reused(engine, task, prompt, list(group), full)
            finally:
                engine.remove(task.name)

    def _full(self, engine: CacheTune, task: Task, prompt: Prompt) -> _Full:
        state = engine.full_prefill(prompt=prompt)
        length = state.cache.get_seq_length()
        (answer,) = greedy_answers(engine, [state], task.answer_tokens)
        target = engine.prompts.encode(answer)
        if appended := state.cache.get_seq_length() - length:
            state.cache.crop(-appended)  # of the answer; 0 would remove everything in some versions of transformers
        return _Full(answer, target, target_logits(engine, [state], target)[0] if target else state.logits[:0])

    def _reused(
        self, engine: CacheTune, task: Task, prompt: Prompt, settings: Sequence[Setting], full: _Full
    ) -> Iterator[Row]:
        read = ((s, engine.prefill(prompt=prompt, selector=s.selector, ratio=s.ratio)) for s in settings)
        while some := list(islice(read, self._together)):
            states = [state for _, state in some]
            apart = target_logits(engine, states, full.target) if full.target else []
            distances = [distance(full.logits, logits, full.target) for logits in apart]
            answers = greedy_answers(engine, states, task.answer_tokens)
            for number, ((setting, state), answer) in enumerate(zip(some, answers, strict=True)):
                figures = spent(engine, task.name, state.report)
                if distances:
                    figures |= {"kl": distances[number].kl, "top1": distances[number].top1}
                yield _row(task, setting, figures, answer)
            del some, states


@dataclass(frozen=True)
class _Full:
    """Full prefill of a prompt: its answer, the answer's tokens, and the logits that predict them."""

    answer: str
    target: list[int]
    logits: Tensor


def _head(task: Task, setting: Setting) -> Row:
    named = {"set": task.cell.kind, "record": task.name, "digest": task.digest}
    return {**named, **asdict(setting), "budget": "ratio"}


def _row(task: Task, setting: Setting, figures: Row, answer: str) -> Row:
    cell = {"length": task.cell.length, "near_duplicates": task.cell.near_duplicates, "form": task.cell.form}
    shape = {"chunk_size": task.chunk_tokens, "chunks": len(task.chunks), "place": task.place}
    return _head(task, setting) | cell | shape | figures | {"right": task.rule.right(answer), "answer": answer}
