"""Makes a worker's engine ready before the server answers requests: on a GPU, the first request with reused chunks would otherwise wait
while kernels are compiled. On a CPU there is nothing to compile.

vLLM calls a worker's connector once more when its own warm-up is over and before it plans a step (`get_handshake_metadata`). Then its CUDA
graphs have the memory that they need, no other thread runs the model, and workers that share one are all at the same point.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch

from cachetune_rag.runtime import Runtime
from cachetune_vllm.logs import logger
from cachetune_vllm.settings import ServerSettings

MOST_COMPUTED = 2048
"""Tokens to compute up to which requests find everything ready. Of larger ones, which compute for far longer, the first of a size
waits a moment, while its CUDA graph is captured."""
OUTSIDE = 512
"""Tokens outside of chunks that a request is expected to have at most: instructions, a question, what a template adds."""
LENGTHS = (8192, 32768, 131072)
"""Prompt lengths for which selectors that look at the attention are made ready, and so for all shorter ones."""

_log = logger(__name__)


def warm_up(engine: Runtime, settings: ServerSettings, longest: int) -> None:
    """Make an engine ready for what a server is asked.

    An error stays without consequence: it is logged, and the first requests are slower.

    Args:
        engine: the engine of the server's own tenant.
        settings: the server's.
        longest: tokens of the longest prompt that is put together.
    """
    computed, largest, lengths = expected(longest, engine.admission.config(settings.selector, settings.ratio).ratio)
    started = time.perf_counter()
    try:
        _make_ready(engine, partial(engine.warmup, computed, lengths, settings.selector), computed, largest)
    except Exception:  # whatever it is, requests compile what they need
        _log.exception(
            "the first requests with reused chunks will be slower, because what they need could not be made ready"
        )
        return
    finally:
        if engine.adapter.device.type == "cuda":
            torch.cuda.empty_cache()  # what was tried needs no memory any more
    if engine.adapter.device.type == "cuda":
        _log.info(
            "ready to reuse chunks in prompts that compute up to %d tokens: what they need was compiled in %.1f s",
            computed,
            time.perf_counter() - started,
        )


def _make_ready(engine: Runtime, warm: Callable[..., None], computed: int, largest: int) -> None:
    """Have an engine made ready: for forwards of up to `largest` tokens where the GPU's memory is enough for these, else for up to `computed` alone."""
    together = engine.adapter.heads.together  # workers that share a model compute this together, and go on together
    try:
        together(partial(warm, largest))
        return
    except torch.OutOfMemoryError:
        if largest <= computed or engine.adapter.heads.shared:  # of peers, the others may have gone on
            raise
    # Not inside `except`: as long as the error is there, it keeps the memory of what was tried.
    _log.warning(
        "the GPU's memory was not enough to make anything ready for requests that compute more than %d tokens: they wait for what they need, and are left to vLLM where memory is "
        "not enough for them either. What helps: a lower --gpu-memory-utilization, or a smaller ratio",
        computed,
    )
    together(warm)


def expected(longest: int, ratio: float) -> tuple[int, int, list[int]]:
    """Where prompts have up to `longest` tokens: how many tokens requests compute for which everything is made ready, how many they compute at most, and the lengths of
    their prompts."""
    largest = min(longest, math.ceil(ratio * longest) + OUTSIDE)
    return min(largest, MOST_COMPUTED), largest, [length for length in LENGTHS if length < longest] + [longest]
