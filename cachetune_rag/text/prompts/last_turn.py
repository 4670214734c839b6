"""Where the last turn of a conversation begins: the question that is to be answered, behind earlier questions and answers."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from cachetune_rag.text.prompts.segments import Prompt

LEAST = 4
"""The fewest tokens of what somebody said. Between control tokens also stand names of roles, which are shorter."""

FindLastTurn = Callable[[Prompt], int]
"""The place from which on a prompt's last turn stands, and nothing of another one. 0 where no turn ends behind the chunks."""


def no_turn(prompt: Prompt) -> int:
    """None: for prompts of token ids that spell no text."""
    return 0


class LastTurns:
    """Finds the last turn (`FindLastTurn`) by the control tokens that a chat template has around each. Safe to use from many threads.

    Args:
        control: the ids of the control tokens.
    """

    def __init__(self, control: Collection[int]):
        self._control = np.array(sorted(control), np.int64)

    def __call__(self, prompt: Prompt) -> int:
        """The beginning of the last turn of a prompt that is complete, so that another control token follows."""
        behind = max((span.end for span in (*prompt.spans, *prompt.passed)), default=0)
        ends = behind + np.flatnonzero(np.isin(prompt.ids_array[behind:], self._control))
        # What stands behind the last control token is the answer's beginning, as far as the template or the caller has it.
        for first, second in zip(ends[-2::-1].tolist(), ends[:0:-1].tolist(), strict=True):
            if second - first > LEAST:
                return first + 1
        return 0
