"""What becomes of a request whose prompt could not be put together: vLLM computes it, and the response says why."""

from __future__ import annotations

import traceback
from typing import Any

import torch

from cachetune_rag.errors import CacheTuneError, ConfigError
from cachetune_rag.model.heads import PeerError
from cachetune_rag.reuse.prompt_room import NoRoomError
from cachetune_store import StoreError
from cachetune_vllm.coming import GivenUpError
from cachetune_vllm.logs import logger
from cachetune_vllm.reasons import Left
from cachetune_vllm.responses import nothing_reused

DEVICE_FULL = "the device's memory was full before its chunks were put together."
"""Why a prompt is left to vLLM for which there was memory, but not for what is computed with it."""

_MEMORY = (NoRoomError.__name__, torch.OutOfMemoryError.__name__)

_log = logger(__name__)


def left_after(error: Exception, request_id: str) -> dict[str, Any]:
    """What the response of a request says whose prompt failed with this error. The log says it too, unless nobody waits for the answer.

    The log is given the error's text, and not the error: whoever keeps it, such as a handler that keeps records of the log, would keep the
    functions that it went through, and with them the prompt's tensors.
    """
    said = str(error)
    if isinstance(error, GivenUpError):
        return nothing_reused(Left.GIVEN_UP)
    if isinstance(error, torch.OutOfMemoryError):
        # What torch has freed meanwhile, it gives to whoever asks next, vLLM too.
        _log.warning("request %s: %s vLLM computes its prompt. %s", request_id, DEVICE_FULL, said)
        return nothing_reused(Left.MEMORY) | {"why": DEVICE_FULL}
    if not isinstance(error, CacheTuneError | StoreError):  # whatever it is, the request is answered
        trace = "".join(traceback.format_exception(error))
        _log.error("request %s: its chunks could not be reused; vLLM computes its prompt\n%s", request_id, trace)
        return nothing_reused(Left.FAILED)
    _log.warning("request %s: %s vLLM computes its prompt.", request_id, said)
    if isinstance(error, ConfigError):
        # What can be checked without the store was checked when the request came. Its bound is kept: vLLM reads the whole prompt.
        return nothing_reused(Left.BOUND) | {"why": said}
    kind = error.kind if isinstance(error, PeerError) else type(error).__name__
    if kind in _MEMORY:  # the same on all workers, whichever of them is asked
        return nothing_reused(Left.MEMORY) | {"why": said if kind == NoRoomError.__name__ else DEVICE_FULL}
    return nothing_reused(Left.FAILED)
