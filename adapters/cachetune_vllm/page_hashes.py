"""The hashes by which vLLM finds pages again. Pages with reused keys and values get hashes of their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cachetune_rag.text.prompts.segments import Prompt
from cachetune_vllm.settings import RequestSettings

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool

_HASH = 32
"""Bytes of a page's hash."""


class CachedPages:
    """Which pages vLLM's prefix cache has."""

    def __init__(self) -> None:
        self._pool: BlockPool | None = None

    def bind(self, pool: BlockPool) -> None:
        """vLLM's pages exist now."""
        self._pool = pool

    def has(self, hashes: Sequence[bytes], number: int) -> bool:
        """Whether page `number` of a request with these hashes can be found again."""
        if self._pool is None or number >= len(hashes):
            return False
        # The first group of layers: vLLM has a single one for connectors that don't ask for several.
        return self._pool.get_cached_block(hashes[number], [0]) is not None


def salt_hashes(hashes: list[bytes], first: int, salt: bytes) -> None:
    """Give pages from number `first` on other hashes. Later pages' hashes follow from the last one, so they differ as well.

    Args:
        hashes: of a request's pages, by vLLM; that of page `first` depends on all tokens before it and whatever else vLLM tells requests apart by.
        first: the first page that changes.
        salt: `salt_of` the request.
    """
    if first >= len(hashes):
        return
    # All of them in one call: a long prompt has a thousand pages, and vLLM's loop waits for this.
    count = len(hashes) - first
    made = hashlib.shake_256(salt + hashes[first]).digest(_HASH * count)
    hashes[first:] = [made[at : at + _HASH] for at in range(0, len(made), _HASH)]


def salt_of(prompt: Prompt, settings: RequestSettings) -> bytes:
    """Identifies what is put together for a prompt: its ids, its chunks and the settings."""
    spans = [[s.start, s.end, s.chunk] for s in prompt.spans]
    said = (spans, settings.ratio, settings.selector, settings.max_kl, settings.min_top1, settings.tenant)
    # The ids apart, and not as text: a long prompt has ten thousands, and vLLM's loop waits for this.
    return hashlib.sha256(prompt.ids_array.tobytes() + json.dumps(said).encode()).digest()
