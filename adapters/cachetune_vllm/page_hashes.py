"""The hashes by which vLLM finds pages again. Pages with reused keys and values get hashes of their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cachetune_rag.text.prompts.segments import Prompt
from cachetune_vllm.settings import RequestSettings

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool


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
    """Change the hashes of pages from number `first` on. Later pages' hashes follow from the last one, so they differ as well."""
    for number in range(first, len(hashes)):
        hashes[number] = hashlib.sha256(salt + hashes[number]).digest()


def salt_of(prompt: Prompt, settings: RequestSettings) -> bytes:
    """Identifies what is put together for a prompt: its ids, its chunks and the settings."""
    spans = [[s.start, s.end, s.chunk] for s in prompt.spans]
    said = (spans, settings.ratio, settings.selector, settings.max_kl, settings.min_top1, settings.tenant)
    # The ids apart, and not as text: a long prompt has ten thousands, and vLLM's loop waits for this.
    return hashlib.sha256(np.array(prompt.ids, np.int64).tobytes() + json.dumps(said).encode()).digest()
