"""Answers prompts' questions with full prefill and under every setting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby, takewhile

import torch
from fidelity.answers import Answer, begin, finish, follow, target_logits
from fidelity.evaluate import Engines, spent
from fidelity.measures import distance
from fidelity.rows import Key, Row, key_of
from fidelity.settings import NOTHING, Setting
from torch import Tensor

from cachetune_rag import CacheTune, Document
from cachetune_rag.reuse.state import PrefillState
from cachetune_rag.text.prompts.prompt import Prompt

from .prompts import Task, TaskMaker
from .references import OTHER_ORDER, REFERENCES, in_other_order
from .settings import FULL


class TaskRunner:
    """Runs prompts through engines of one model.

    Args:
        engines: the model's engines.
        maker: makes the prompts, and has what they have in common.
        settings: what to compare. Those of one lead-in and codec stand together.
        together: for how many settings the answer is decoded in one forward, for each prompt of a group.
        rounded: engines of the model in bfloat16, if `BFLOAT16` is among the settings.
    """

    def __init__(
        self,
        engines: Engines,
        maker: TaskMaker,
        settings: Sequence[Setting],
        together: int = 1,
        rounded: Engines | None = None,
    ):
        self._engines, self._maker, self._settings, self._together = engines, maker, settings, together
        self._rounded = rounded or engines

    def run(self, tasks: Sequence[Task], known: dict[Key, Row]) -> Iterator[Row]:
        """Measure and yield those rows of a group of prompts that are not known yet.

        Their chunks are computed together, and so are their answers. That changes no row, and takes a GPU a fraction of the time.

        Args:
            tasks: prompts of one cell.
            known: rows that were measured before.
        """
        tried = [_Tried(task, self._maker.prompt(task), self._missing(task, known)) for task in tasks]
        tried = [each for each in tried if each.wanted]
        if not tried:
            return
        dataset = self._maker.dataset_of(tried[0].task.cell)
        again = list(REFERENCES.values())
        reused = [s for s in self._settings if s not in (FULL, *again)]
        other = next(iter(reused), Setting("first_token", "exact", NOTHING, 0.0))
        self._answer_with_full_prefill(self._engines.get(dataset, other.lead_in, other.codec), tried)
        for each in tried:
            if FULL in each.wanted:
                yield _row(each.task, FULL, _all_computed(each.prompt), each.answer, each.answer)
        for setting in (s for s in self._settings if s in again):
            yield from self._once_more([each for each in tried if setting in each.wanted], setting)
        for (lead_in, codec), group in groupby(reused, key=lambda s: (s.lead_in, s.codec)):
            settings = list(group)
            some = [each for each in tried if any(s in each.wanted for s in settings)]
            if not some:
                continue
            engine, name = self._engines.get(dataset, lead_in, codec), some[0].task.name
            engine.precompute(Document(name, [chunk for each in some for chunk in each.task.chunks]))
            try:
                yield from self._reused(engine, some, settings)
            finally:
                engine.remove(name)

    def _missing(self, task: Task, known: dict[Key, Row]) -> list[Setting]:
        return [s for s in self._settings if key_of(_head(task, s)) not in known]

    def _answer_with_full_prefill(self, engine: CacheTune, tried: Sequence[_Tried]) -> None:
        for each in tried:
            each.full = engine.full_prefill(prompt=each.prompt)
            each.answer = begin(engine, each.full, each.task.answer_tokens)
        finish(engine, [each.answer for each in tried], len(tried))
        for each in tried:
            each.target = engine.prompts.encode(each.answer.text())

    def _once_more(self, tried: Sequence[_Tried], setting: Setting) -> Iterator[Row]:
        """Full prefill of prompts with something changed (`references`)."""
        if not tried:
            return
        engines = self._engines if setting == OTHER_ORDER else self._rounded
        engine = engines.get(self._maker.dataset_of(tried[0].task.cell), "first_token", "exact")
        answers = []
        for each in tried:
            prompt = self._maker.prompt(in_other_order(each.task)) if setting == OTHER_ORDER else each.prompt
            answers.append(begin(engine, engine.full_prefill(prompt=prompt), each.task.answer_tokens))
        finish(engine, answers, len(answers))
        for each, answer in zip(tried, answers, strict=True):
            yield _row(each.task, setting, _all_computed(each.prompt), answer, each.answer)

    def _reused(self, engine: CacheTune, tried: Sequence[_Tried], settings: Sequence[Setting]) -> Iterator[Row]:
        found = [row for each in tried for row in self._read(engine, each, [s for s in settings if s in each.wanted])]
        finish(engine, [answer for *_, answer in found], self._together * len(tried))
        full = {each.task.name: each.answer for each in tried}
        for task, setting, figures, answer in found:
            yield _row(task, setting, figures, answer, full[task.name])

    def _read(self, engine: CacheTune, tried: _Tried, settings: Sequence[Setting]) -> Iterator[_Found]:
        """A prompt under several settings: what it cost, how far it is from full prefill, and as much of the answer as is full prefill's too."""
        if settings[0].selector != NOTHING:
            # A probe computes less once the prefix is kept from an earlier prompt, as it is from here on.
            engine.prefill(prompt=tried.prompt, selector=NOTHING, ratio=0.0)
        for start in range(0, len(settings), self._together):
            part = settings[start : start + self._together]
            states = [engine.prefill(prompt=tried.prompt, selector=s.selector, ratio=s.ratio) for s in part]
            (_, *answers), logits = follow(engine, [tried.full, *states], tried.answer)
            if tried.target != tried.answer.tokens[: len(tried.target)]:  # another way to write the same text
                logits = target_logits(engine, [tried.full, *states], tried.target)
            count = len(tried.target)
            sure = _least_probability(logits[0][:count], tried.target) if count else None
            for number, (setting, state) in enumerate(zip(part, states, strict=True)):
                figures = spent(engine, tried.task.name, state.report)
                if count:
                    apart = distance(logits[0][:count], logits[number + 1][:count], tried.target)
                    figures |= {"kl": apart.kl, "top1": apart.top1, "sure": sure}
                yield tried.task, setting, figures, answers[number]


_Found = tuple[Task, Setting, Row, Answer]
"""What is to become a row, once its answer is done."""


class _Tried:
    """A prompt of a group.

    Args:
        task, prompt: the prompt.
        wanted: settings whose rows aren't known yet.

    Attributes:
        full: full prefill of the prompt.
        answer: its answer.
        target: the tokens of this answer's text, over which settings are compared with it.
    """

    full: PrefillState
    answer: Answer
    target: Sequence[int]

    def __init__(self, task: Task, prompt: Prompt, wanted: Sequence[Setting]):
        self.task, self.prompt, self.wanted = task, prompt, list(wanted)


def _least_probability(logits: Tensor, target: Sequence[int]) -> float:
    """How likely the least likely token of an answer is, by the logits that predict its tokens, [tokens, vocab]."""
    ids = torch.tensor(list(target), device=logits.device)[:, None]
    return float(logits.double().softmax(-1).gather(1, ids).min())


def _all_computed(prompt: Prompt) -> Row:
    """What full prefill of a prompt computes."""
    tokens = sum(len(chunk) for chunk in prompt.chunk_ids)
    cost = {"chunk_tokens": tokens, "recomputed": tokens, "probed": 0, "compute": 1.0}
    return {"prompt_tokens": len(prompt.ids), **cost}


def _head(task: Task, setting: Setting) -> Row:
    named = {"set": task.cell.kind, "record": task.name, "digest": task.digest}
    return {**named, **asdict(setting), "budget": "ratio"}


def _row(task: Task, setting: Setting, figures: Row, answer: Answer, full: Answer) -> Row:
    """A row of results. `full` is the answer of full prefill."""
    cell = {"length": task.cell.length, "near_duplicates": task.cell.near_duplicates, "form": task.cell.form}
    shape = {"chunk_size": task.chunk_tokens, "chunks": len(task.chunks), "place": task.place}
    pairs = zip(answer.tokens, full.tokens, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    said = {"sure_by_token": [round(sure, 6) for sure in answer.sure], "same_tokens": same}
    text = answer.text()
    return _head(task, setting) | cell | shape | figures | said | {"right": task.rule.right(text), "answer": text}
