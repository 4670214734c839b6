"""Decides whether a prompt whose chunks must be read from a disk is left to vLLM, because the disk takes longer than vLLM takes for the prompt."""

from __future__ import annotations

from cachetune_vllm.measured import TRIED, shown

CLEARLY = 1.2
"""Reading has to take so many times as long as vLLM. Below that, either may be faster: both times vary by some tenths. Chosen, not measured."""


class SlowDisk:
    """The decision for the prompts of one worker. Workers that share a model ask it alike, so it says the same to all. Not for several threads."""

    def __init__(self) -> None:
        self._slow = 0

    def leaves(self, plain: float, reading: float) -> bool:
        """Whether a prompt is left to vLLM. Every so many prompts with too slow a disk reuse their chunks all the same, so that what was slow for a while is
        measured anew.

        Args:
            plain: seconds in which vLLM is expected to read it.
            reading: seconds in which its rows are expected to be read, at the least. Rows are read while others are computed with, so this is what reuse
                takes, at the least.
        """
        if reading <= CLEARLY * plain:
            return False
        self._slow += 1
        return self._slow % TRIED != 0


def why(plain: float, reading: float) -> str:
    """A left prompt's reason as a sentence."""
    from_disk, theirs = shown((reading, plain))
    return f"its chunks would take {from_disk} to be read from disk and vLLM {theirs} for the prompt, by what this server took lately"
