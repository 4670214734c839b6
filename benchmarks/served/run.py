"""Measures the cells of a plan on a server that runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from served.load import alone, closed, open_loop, while_running
from served.plan import SETTINGS, Cell
from served.targets import Reuse, Target
from served.workload import Workload

FILLINGS = 5
"""How often every stored chunk is asked for at most, before all have to be in host memory."""


@dataclass(frozen=True)
class Amounts:
    """How much is asked.

    Attributes:
        rounds: requests of a time to first token (two more warm up).
        requests: requests of a saturated server.
        at_once: clients of a saturated server.
        tokens: tokens of an answer.
    """

    rounds: int
    requests: int
    at_once: int
    tokens: int


class Run:
    """Measures cells.

    Args:
        workload: makes the prompts.
        amounts: how much is asked.
        rate_of: vLLM's saturated requests per second at a context, measured before; None if it was not.
    """

    def __init__(self, workload: Workload, amounts: Amounts, rate_of: Callable[[int], float | None]):
        self._workload, self._amounts, self._rate_of = workload, amounts, rate_of

    async def fill_memory(self, target: Target, context: int) -> None:
        """Ask for every stored chunk, until none is read from disk any more: the tables are of chunks in host memory.

        Raises:
            ValueError: chunks are still read from disk at the last try.
        """
        for _ in range(FILLINGS):
            reports = [
                (await target.ask(prompt, 1, {"ratio": 0.05})).report for prompt in self._workload.covering(context)
            ]
            if not any((report or {}).get("bytes_read", {}).get("disk") for report in reports):
                return
        raise ValueError(
            f"chunks are still read from disk after every one was asked for {FILLINGS} times: give the server more memory (--connector host_budget=...)."
        )

    async def measure(self, target: Target, cell: Cell) -> dict[str, Any]:
        """One cell.

        Raises:
            ValueError: it needs vLLM's saturated rate, which is not known.
        """
        do, many = self._amounts, self._workload
        reuse: Reuse | None = SETTINGS.get(cell.setting)
        # Every cell has orders and questions of its own, so that no prompt is found complete in a cache. Cells that are
        # compared differ in these alone: their prompts have the same lengths.
        seed = f"{cell.phase} {cell.context} {cell.detail}" + (f" {cell.setting}" if cell.variant == "reuse" else "")
        if cell.phase in ("alone", "short"):
            return await alone(target, many.prompts(cell.context, do.rounds + 2, seed), reuse)
        if cell.phase == "plain":  # prompts without any stored chunk
            prompts = many.prompts(cell.context, do.rounds + 2 + do.requests, seed, share=0)
            first = await alone(target, prompts[: do.rounds + 2], None)
            return first | await closed(target, prompts[do.rounds + 2 :], None, do.tokens, do.at_once)
        if cell.phase == "prefix":
            prompts = many.prompts(
                cell.context, do.rounds + 2, seed, order="same" if cell.detail == "same" else "shuffled"
            )
            return await alone(target, prompts, None)
        if cell.phase == "shares":
            share = {"stored 0.8": 0.8, "stored 0": 0.0}.get(cell.detail, 1.0)
            log_normal = cell.detail == "log-normal"
            prompts = many.prompts(cell.context, do.requests, seed, share=share, log_normal=log_normal)
            return await closed(target, prompts, reuse, do.tokens, do.at_once)
        if cell.phase == "gaps":
            running = many.prompts(1024, 4, f"{seed} running", share=0)
            return await while_running(target, running, many.prompts(cell.context, 8, seed), reuse, 8 * do.tokens, 0.5)
        if cell.phase == "arrivals":
            rate = self._rate_of(cell.context)
            if rate is None:
                raise ValueError("arrivals need vLLM's saturated rate: measure the phase saturated first.")
            prompts = many.prompts(cell.context, do.requests, seed)
            return await open_loop(target, prompts, reuse, do.tokens, float(cell.detail) * rate, seed)
        await closed(target, many.prompts(cell.context, do.at_once, f"{seed} warm"), reuse, 4, do.at_once)
        return await closed(target, many.prompts(cell.context, do.requests, seed), reuse, do.tokens, do.at_once)
