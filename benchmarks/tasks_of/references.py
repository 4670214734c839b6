"""Full prefill once more with something changed that should change no answer. What it loses was a close call, so it says how much of what reuse loses may be that, too."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import torch
from fidelity.forms import PLAIN
from fidelity.settings import Setting

from .prompts import Task

OTHER_ORDER = Setting("-", "-", "other_order", 1.0)
"""The same chunks in another order. The two of a fact that is split stay together."""
BFLOAT16 = Setting("-", "-", "bfloat16", 1.0)
"""The same prompt, weights and computation in bfloat16."""
REFERENCES = {setting.selector: setting for setting in (OTHER_ORDER, BFLOAT16)}


def rounded_model(model: Any) -> Any:
    """A copy of a model in bfloat16."""
    return copy.deepcopy(model).to(torch.bfloat16)


def in_other_order(task: Task) -> Task:
    """The same task with its chunks in another order, which depends on the task alone.

    Raises:
        ValueError: its form is not the plain one, so it isn't known which chunks belong together.
    """
    if task.cell.form != PLAIN:
        raise ValueError(f"{task.name} has the form {task.cell.form}, and only {PLAIN} prompts have another order.")
    begun = {planted.chunks[0] for planted in task.planted if len(planted.chunks) > 1}
    blocks: list[list[str]] = []
    for number, chunk in enumerate(task.chunks):
        if number - 1 in begun:
            blocks[-1].append(chunk)
        else:
            blocks.append([chunk])
    order, rng = list(range(len(blocks))), random.Random(task.digest)
    if len(order) > 1:
        while order == sorted(order):
            rng.shuffle(order)
    return replace(task, chunks=tuple(chunk for block in order for chunk in blocks[block]))
