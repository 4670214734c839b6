"""Answers a prompt's question with full prefill and under every setting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby, islice

from fidelity.evaluate import Engines, greedy_answers, spent
from fidelity.rows import Key, Row, key_of
from fidelity.settings import NOTHING, Setting

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
        prompt = self._maker.prompt(task)
        wanted = [s for s in self._settings if key_of(_head(task, s)) not in known]
        for (lead_in, codec), group in groupby(wanted, key=lambda s: (s.lead_in, s.codec)):
            settings = list(group)
            if settings == [FULL]:
                yield from self._full(task, prompt)
                continue
            engine = self._engines.get(self._maker.dataset, lead_in, codec)
            engine.precompute(Document(task.name, list(task.chunks)))
            try:
                # A probe computes less once the prefix is kept from an earlier prompt, as it is from here on.
                engine.prefill(prompt=prompt, selector=NOTHING, ratio=0.0)
                yield from self._reused(engine, task, prompt, settings)
            finally:
                engine.remove(task.name)

    def _full(self, task: Task, prompt: Prompt) -> Iterator[Row]:
        other = next((s for s in self._settings if s != FULL), Setting("first_token", "exact", NOTHING, 0.0))
        engine = self._engines.get(self._maker.dataset, other.lead_in, other.codec)
        state = engine.full_prefill(prompt=prompt)
        (answer,) = greedy_answers(engine, [state], task.answer_tokens)
        tokens = sum(len(chunk) for chunk in prompt.chunk_ids)
        figures = {"chunk_tokens": tokens, "recomputed": tokens, "probed": 0, "compute": 1.0}
        yield _row(task, FULL, {"prompt_tokens": len(prompt.ids), **figures}, answer)

    def _reused(self, engine: CacheTune, task: Task, prompt: Prompt, settings: Sequence[Setting]) -> Iterator[Row]:
        read = ((s, engine.prefill(prompt=prompt, selector=s.selector, ratio=s.ratio)) for s in settings)
        while some := list(islice(read, self._together)):
            answers = greedy_answers(engine, [state for _, state in some], task.answer_tokens)
            for (setting, state), answer in zip(some, answers, strict=True):
                yield _row(task, setting, spent(engine, task.name, state.report), answer)
            del some


def _head(task: Task, setting: Setting) -> Row:
    named = {"set": task.cell.kind, "record": task.name, "digest": task.digest}
    return {**named, **asdict(setting), "budget": "ratio"}


def _row(task: Task, setting: Setting, figures: Row, answer: str) -> Row:
    cell = {"length": task.cell.length, "near_duplicates": task.cell.near_duplicates}
    shape = {"chunk_size": task.chunk_tokens, "place": task.place}
    return _head(task, setting) | cell | shape | figures | {"right": task.rule.right(answer), "answer": answer}
