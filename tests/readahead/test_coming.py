"""Chunks that are read for a coming request, and handed to it half read."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cachetune_rag.readahead.coming import ReadAhead
from cachetune_store import ChunkStore, Namespace, make_key

TOKENS, LAYERS = 100, 4


def test_deviations_come_with_the_first_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that takes the chunk before all of it is read has what its selector needs first."""
    namespace, ids = Namespace("model", "tokenizer", "float32", ((1,), (2,))), list(range(TOKENS))
    key, spread = make_key(namespace, ids), torch.rand(TOKENS, 4 * LAYERS).half()
    layers = [(torch.randn(TOKENS, 2, 8), torch.randn(TOKENS, 2, 8)) for _ in range(LAYERS)]
    with ChunkStore(tmp_path, host_budget=0) as store:
        store.put(key, layers, torch.rand(TOKENS), namespace=namespace, token_ids=ids, deviations=spread)
    reads, real = [], os.preadv

    def preadv(fd: int, areas: list[memoryview], position: int) -> int:
        reads.append(position)
        return real(fd, areas, position)

    monkeypatch.setattr(os, "preadv", preadv)
    allowed = threading.Semaphore(2)  # one to begin, and one for the first read

    def wait(stopped: Callable[[], bool]) -> None:
        while not stopped() and not allowed.acquire(timeout=0.01):
            pass

    with ChunkStore(tmp_path) as store:
        ahead = ReadAhead(store, 1 << 30, wait, lambda _: False)
        try:
            ahead.fetch(lambda: [key])
            until = time.monotonic() + 30
            while len(reads) < 3:
                assert time.monotonic() < until
                time.sleep(0.01)
            with ahead.take([key])[key] as reader:
                assert not reader.deviations_wait
                assert [reader.has(layer, TOKENS) for layer in range(LAYERS)] == [True, False, False, False]
                assert torch.equal(reader.deviations, spread)
            assert len(reads) == 3, "the head, the deviations and a layer"
        finally:
            ahead.close()
