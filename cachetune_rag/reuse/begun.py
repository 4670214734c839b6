"""A prompt whose stored rows are brought while the prompt before it is still computed."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from cachetune_rag.reuse.memory import KVMemory
from cachetune_rag.reuse.opening import Opened
from cachetune_rag.reuse.plan import Plan, Prepared


@dataclass(frozen=True)
class Begun:
    """A prompt that was begun before its turn. Whoever began it closes it, also when it was used.

    Attributes:
        opened: its chunks.
        memory: owns its rows.
        prepared: what its plan is made with; None if all of it is computed.
        plan: its plan, where that could be made without looking at stored rows.
        seconds: how long it took to look its chunks up.
    """

    opened: Opened
    memory: KVMemory
    prepared: Prepared | None
    plan: Plan | None
    seconds: float
    _stack: ExitStack

    def go_on(self) -> None:
        """Have some more of its rows brought. Called again and again until its turn comes."""
        if self.prepared is not None:
            self.prepared.loader.bring()

    def hand_over(self) -> ExitStack:
        """What closes it, for the caller to keep from now on."""
        return self._stack.pop_all()

    def close(self) -> None:
        """It is not wanted any more. Nothing happens if it was used."""
        self._stack.close()
