"""What answers a benchmark's requests: vLLM's engine, started by this program."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

FORGETTING = 200
"""How often it is tried to empty vLLM's prefix cache."""
Reuse = Mapping[str, Any]
"""Settings of a request (`kv_transfer_params["cachetune"]`)."""


@dataclass
class Answer:
    """How one request went.

    Attributes:
        ttft: seconds to its first token.
        gaps: seconds between later tokens.
        report: what the response says of reuse.
        began: when it was asked (`time.perf_counter`).
    """

    ttft: float
    gaps: list[float] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    began: float = 0.0


class Target:
    """vLLM's engine, started by this program.

    Attributes:
        engine: an `AsyncLLM`.
    """

    def __init__(self, engine: Any):
        self.engine, self._numbers = engine, itertools.count()

    async def ask(self, ids: list[int], tokens: int, reuse: Reuse | None) -> Answer:
        """Let a prompt be answered by exactly `tokens` tokens."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        extra = None if reuse is None else {"kv_transfer_params": {"cachetune": dict(reuse)}}
        sampling = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra,
        )
        times, report = [time.perf_counter()], None
        async for output in self.engine.generate({"prompt_token_ids": ids}, sampling, f"r{next(self._numbers)}"):
            times.append(time.perf_counter())
            report = output.kv_transfer_params or report
        return _answer(times, report)

    async def forget(self) -> None:
        """Empty vLLM's prefix cache. It can't be while a page is in use, as it is for a moment after an answer.

        Raises:
            RuntimeError: pages stay in use.
        """
        for _ in range(FORGETTING):
            if await self.engine.reset_prefix_cache() is not False:
                return
            await asyncio.sleep(0.01)
        raise RuntimeError(
            f"vLLM's prefix cache could not be emptied in {FORGETTING} tries, because pages are in use: ask nothing else of the server meanwhile."
        )


def _answer(times: list[float], params: Mapping[str, Any] | None) -> Answer:
    between = [b - a for a, b in itertools.pairwise(times)]
    return Answer(between[0], between[1:], dict((params or {}).get("cachetune", {})), times[0])


@asynccontextmanager
async def in_process(model: str, connector: Mapping[str, Any] | None, **options: Any) -> AsyncIterator[Target]:
    """Start vLLM's engine.

    Args:
        model: folder of the model.
        connector: `KVTransferConfig`'s arguments; None for plain vLLM.
        options: of `AsyncEngineArgs`.
    """
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    transfer = None if connector is None else KVTransferConfig(kv_role="kv_both", **connector)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, kv_transfer_config=transfer, **options))
    try:
        yield Target(engine)
    finally:
        engine.shutdown()


def pairs(words: Sequence[str]) -> dict[str, Any]:
    """Options as NAME=VALUE; a value that is JSON (a number, true, an object) is read as such."""
    found: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
