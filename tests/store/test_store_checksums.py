"""Checksums are those of XXH3 for any length, and threads that read don't wait for each other."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash

from cachetune_store.checksums import rows_checksum, update

LENGTHS = [0, 1, 4096, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 3 << 16, 1_000_003]


@pytest.mark.parametrize("length", LENGTHS)
def test_rows_are_checked_by_xxh3_64(length: int) -> None:
    data = np.random.default_rng(length).bytes(length)
    assert rows_checksum(memoryview(data)) == xxhash.xxh3_64_intdigest(data)


@pytest.mark.parametrize("length", LENGTHS)
def test_heads_are_checked_by_xxh3_128(length: int) -> None:
    data = np.random.default_rng(length).bytes(length)
    state = xxhash.xxh3_128()
    update(state, data)
    assert state.digest() == xxhash.xxh3_128_digest(data)


def test_no_more_is_hashed_at_a_time_than_xxhash_keeps_the_lock_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[int] = []

    class Spy:
        def update(self, data: memoryview) -> None:
            pieces.append(len(data))

        def intdigest(self) -> int:
            return 0

    monkeypatch.setattr(xxhash, "xxh3_64", Spy)
    rows_checksum(memoryview(bytes(200_000)))
    assert sum(pieces) == 200_000
    assert max(pieces) <= 65536
