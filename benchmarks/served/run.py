"""Measures the cells of a plan on a server that runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from served.choosing import MORE, choosing
from served.disk import SLOWED_PROMPTS, TRIED, from_disk, from_slowed_disk
from served.host_time import host
from served.load import alone, both_ways, closed, most_within, open_loop, paused, while_running
from served.plan import PAUSES, SHORT_CHUNKS, SLOWED, TINY, Cell, setting_of
from served.targets import Reuse, Target
from served.timeline import timeline
from served.workload import Order, Workload

FILLINGS = 20
"""How often every stored chunk is asked for at most, before all have to be in host memory."""
WARM = 4
"""Requests before those of a saturated server. They don't count: the first request of a size compiles."""


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


MANY, FEW = Amounts(rounds=7, requests=48, at_once=16, tokens=64), Amounts(rounds=2, requests=12, at_once=4, tokens=8)
"""What is asked unless it is said otherwise: to measure with, and of tiny models, to see whether everything runs."""


class Run:
    """Measures cells.

    Args:
        workloads: makes the prompts, by the codec of the chunks in them; `SHORT_CHUNKS`: those of the phase `short`.
        amounts: how much is asked.
        rate_of: a saturated server's requests per second, by server, context and setting, measured before; None if it was not.
    """

    def __init__(
        self,
        workloads: Mapping[str, Workload],
        amounts: Amounts,
        rate_of: Callable[[str, int, str], float | None],
    ):
        self._workloads, self._amounts, self._rate_of = workloads, amounts, rate_of

    async def fill_memory(self, target: Target, context: int, codecs: Collection[str]) -> None:
        """Ask for every stored chunk of these codecs, and for the short ones, until none is read from disk any more: most tables are of chunks in host memory.

        Raises:
            ValueError: nothing is reused, or chunks are still read from disk at the last try.
        """
        for _ in range(FILLINGS):
            reports = [
                (await target.ask(prompt, 1, {"ratio": 0.05})).report or {}
                for name, workload in self._workloads.items()
                if name in codecs or name == SHORT_CHUNKS
                for prompt in workload.covering(context)
            ]
            if not any(report.get("reused") for report in reports):
                raise ValueError(
                    f"the server reuses nothing, so there is nothing to measure: requests are left to vLLM ({reports[0].get('left')}). {reports[0].get('why', '')}"
                )
            if not any(report.get("bytes_read", {}).get("disk") for report in reports):
                return
        raise ValueError(
            f"chunks are still read from disk after every one was asked for {FILLINGS} times: give the server more memory (--connector host_budget=...)."
        )

    async def measure(self, target: Target, cell: Cell) -> dict[str, Any]:
        """One cell.

        Raises:
            ValueError: it needs vLLM's saturated rate, which is not known.
        """
        setting = setting_of(cell.setting)
        do, many = self._amounts, self._workloads["exact" if setting is None else setting.codec]
        reuse: Reuse | None = setting.asked if setting is not None else {} if cell.setting == "auto" else None
        seed = cell.prompts
        arriving = str(cell.context)  # what is compared arrives at the same times
        if cell.phase == "alone":
            return await alone(target, many.prompts(cell.context, do.rounds + 2, seed), reuse)
        if cell.phase == "paused":
            await target.forget()
            return await paused(target, many.prompts(cell.context, do.rounds + 2, seed), reuse, PAUSES[cell.detail])
        if cell.phase == "short":
            prompts = self._workloads[SHORT_CHUNKS].prompts(cell.context, do.rounds + 2, seed)
            return await both_ways(target, prompts, cell.variant == "reuse")
        if cell.phase == "plain":  # prompts without any stored chunk
            prompts = many.prompts(cell.context, do.rounds + 2 + do.requests, seed, share=0)
            first = await alone(target, prompts[: do.rounds + 2], None)
            loaded = await closed(target, prompts[do.rounds + 2 :], None, do.tokens, do.at_once)
            return {"alone": first["ttft"], **loaded}
        if cell.phase == "prefix":
            order: Order = "same" if cell.detail == "same" else "shuffled"
            prompts = many.prompts(cell.context, do.rounds + 2, seed, order=order, alike=True)
            return await alone(target, prompts, None)
        if cell.phase == "choosing":
            return await choosing(target, many.prompts(cell.context, MORE * do.rounds + 2, seed), reuse, cell.detail)
        if cell.phase == "host":
            prompts = many.prompts(cell.context, do.rounds + 3, seed)
            return await host(target, [ids[-TINY:] for ids in prompts] if cell.context == TINY else prompts, reuse)
        if cell.phase == "disk":
            if cell.detail == SLOWED:
                prompts = many.prompts(cell.context, TRIED + SLOWED_PROMPTS, seed)
                return await from_slowed_disk(target, prompts, reuse or {})
            return await from_disk(target, many.prompts(cell.context, do.rounds + 1, seed), reuse or {})
        if cell.phase == "timeline":
            running = many.prompts(1024, 4, f"{seed} running", share=0)
            return await timeline(target, running, many.prompts(cell.context, 3, seed), reuse or {}, 16 * do.tokens)
        if cell.phase == "shares":
            share = {"stored 0.8": 0.8, "stored 0": 0.0}.get(cell.detail, 1.0)
            log_normal = cell.detail == "log-normal"
            warm = many.prompts(cell.context, WARM, f"{seed} warm", share=share, log_normal=log_normal)
            await closed(target, warm, reuse, 4, do.at_once)
            prompts = many.prompts(cell.context, do.requests, seed, share=share, log_normal=log_normal)
            return await closed(target, prompts, reuse, do.tokens, do.at_once)
        if cell.phase == "gaps":
            running = many.prompts(1024, 4, f"{seed} running", share=0)
            return await while_running(
                target, running, many.prompts(cell.context, min(8, do.requests // 4), seed), reuse, 8 * do.tokens, 0.5
            )
        if cell.phase == "within":
            saturated = self._known_rate(cell.variant, cell.context, cell.setting)

            async def at(part: float) -> dict[str, Any]:
                prompts = many.prompts(cell.context, do.requests, f"{seed} {part}")
                return await open_loop(target, prompts, reuse, do.tokens, part * saturated, arriving)

            return await most_within(at)
        if cell.phase == "arrivals":
            rate = float(cell.detail) * self._known_rate("vllm", cell.context, "")
            return await open_loop(
                target, many.prompts(cell.context, do.requests, seed), reuse, do.tokens, rate, arriving
            )
        await closed(target, many.prompts(cell.context, WARM, f"{seed} warm"), reuse, 4, do.at_once)
        return await closed(target, many.prompts(cell.context, do.requests, seed), reuse, do.tokens, do.at_once)

    def _known_rate(self, variant: str, context: int, setting: str) -> float:
        rate = self._rate_of(variant, context, setting)
        if rate is None:
            raise ValueError(
                f"arrivals at {context} tokens need the requests per second of the saturated server ({variant} {setting}): measure the phase saturated first."
            )
        return rate
