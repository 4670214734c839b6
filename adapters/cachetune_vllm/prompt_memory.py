"""How much of a GPU the prompts that are put together may take, beside what vLLM takes.

Nothing can be reserved: vLLM (0.26 to 0.32) makes a worker's connector after it has sized its cache. A plugin runs earlier, but in servers without the
connector too, and a worker extension may not replace the method that sizes the cache. So what vLLM leaves is measured when the server starts, and
prompts stay within a part of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from cachetune_rag.errors import ConfigError
from cachetune_rag.reuse.prompt_room import aligned
from cachetune_rag.runtime import Runtime
from cachetune_store.printing import shown
from cachetune_store.units import format_bytes, parse_bytes
from cachetune_vllm.logs import logger
from cachetune_vllm.settings import ServerSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEPT_FREE = 1 << 30
"""Bytes of a device that are left free for what vLLM allocates after its cache (its CUDA graphs), and for the engine's own graphs."""
SHARE_OF_FREE = 0.6
"""Share of the remaining free memory that prompts' keys and values may take; intermediate results need memory as well."""
SLACK = 1 << 20
"""Bytes that a prompt's memory may have beyond its rows, because it begins at a round address."""

_log = logger(__name__)


def prompt_memory(config: VllmConfig, settings: ServerSettings, engine: Runtime) -> int | None:
    """Bytes that prompts' keys and values take at most in this worker; None: as many as they need.

    Raises:
        ConfigError: the device has not as many as the operator asks for.
    """
    adapter, asked = engine.adapter, settings.prompt_memory
    if adapter.device.type != "cuda":
        return None if asked == "auto" else aligned(parse_bytes(asked, "prompt_memory"))
    free, total = torch.cuda.mem_get_info(adapter.device)
    cache = config.cache_config
    share = None if getattr(cache, "kv_cache_memory_bytes", None) else cache.gpu_memory_utilization
    return settled(
        asked,
        left=left_by_vllm(free, total, share),
        total=total,
        chunks=engine.store.device_budget,
        row_bytes=adapter.row_bytes,
        longest=config.model_config.max_model_len,
    )


def left_by_vllm(free: int, total: int, share: float | None) -> int:
    """Bytes of a device that vLLM doesn't take. When the connector is made, it has not taken all that it will: its steps need memory as well.

    Args:
        free: bytes of the device that nobody has taken.
        total: all bytes of the device.
        share: vLLM's share of them (`--gpu-memory-utilization`); None: it is not bounded so.
    """
    return free if share is None else min(free, int(total * (1 - share)))


def room_in(left: int, chunks: int = 0) -> int:
    """Bytes that prompts' keys and values may take.

    Args:
        left: bytes of the device that vLLM leaves.
        chunks: bytes that chunks will take which are kept on the device (`device_budget`).
    """
    return max(0, int(SHARE_OF_FREE * (left - KEPT_FREE - chunks)))


def needed_for(room: int, chunks: int = 0) -> int:
    """Bytes that vLLM has to leave so that prompts' keys and values may take `room` bytes."""
    return math.ceil(room / SHARE_OF_FREE) + KEPT_FREE + chunks


def settled(asked: int | str, *, left: int, total: int, chunks: int, row_bytes: int, longest: int) -> int:
    """What the setting `prompt_memory` comes to, in bytes. The log says what that means for prompts.

    Args:
        asked: the setting.
        left: bytes of the device that vLLM leaves.
        total: all bytes of the device.
        chunks: see `room_in`.
        row_bytes: bytes of one token's keys and values, over all layers.
        longest: tokens of the server's longest prompt.

    Raises:
        ConfigError: the setting names more bytes than there are.
    """
    room, whole = room_in(left, chunks), longest * row_bytes
    if asked == "auto":
        # Enough for two prompts that are there at once: the next one gets the memory of the one before, layer after layer.
        room = min(room, whole + SLACK)
    elif (named := parse_bytes(asked, "prompt_memory")) > room:
        raise ConfigError(
            f"prompt_memory is {shown(asked)}, and of the {format_bytes(left)} of the GPU that vLLM leaves, prompts may take {format_bytes(room)}: "
            f'use "auto" or at most that, or let vLLM leave {format_bytes(needed_for(named, chunks))} (a lower --gpu-memory-utilization).'
        )
    else:
        room = named
    room = aligned(room)
    most = room // row_bytes
    _log.info(
        "prompts of up to %d tokens can reuse chunks: their keys and values take up to %s of the GPU, beside what vLLM takes",
        min(most, longest),
        format_bytes(room),
    )
    if most < longest:
        needed = needed_for(whole, chunks)
        if needed <= left:
            advice = f"prompt_memory {format_bytes(whole)}"
        elif (share := math.floor(100 * (1 - needed / total)) / 100) > 0:
            advice = f"--gpu-memory-utilization {share:g}, by which vLLM leaves {format_bytes(needed)} of the GPU and not {format_bytes(left)}"
        else:
            advice = "a GPU with more memory"
        _log.warning(
            'prompts of more than %d tokens are left to vLLM (reason "memory"), and this server takes up to %d. What helps: %s; or a smaller '
            "--max-model-len",
            most,
            longest,
            advice,
        )
    return room
