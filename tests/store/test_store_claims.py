"""Claims keep threads and processes from computing the same chunk twice, and prevent nothing else."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from store_samples import claimed_and_stopped, sample

from cachetune_store import ChunkKey, ChunkStore, Holders

SPAWN = multiprocessing.get_context("spawn")
KEYS = [sample(seed).key for seed in range(4)]


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChunkStore]:
    with ChunkStore(tmp_path if request.param == "disk" else None) as opened:
        yield opened


def test_a_key_is_held_by_one_claim(store: ChunkStore) -> None:
    with store.claim(KEYS[:2]) as one:
        assert one.keys == set(KEYS[:2])
        with store.claim(KEYS[1:3]) as two:
            assert two.keys == {KEYS[2]}
        with store.claim(KEYS) as three:
            assert three.keys == set(KEYS[2:])
    with store.claim(KEYS) as all_of_them:
        assert all_of_them.keys == set(KEYS)
        sample(0).put(store)
    assert store.contains(KEYS[0])


def test_a_claim_ends_when_it_is_closed_or_forgotten(store: ChunkStore) -> None:
    claim = store.claim(KEYS)
    claim.close()
    claim.close()
    forgotten = store.claim(KEYS)
    assert forgotten.keys == set(KEYS)
    del forgotten
    with store.claim(KEYS) as again:
        assert again.keys == set(KEYS)


def test_a_claim_tells_what_its_own_thread_holds_already(store: ChunkStore) -> None:
    with store.claim(KEYS[:2]) as one:
        assert one.own == frozenset()
        with store.claim(KEYS[1:3]) as two:
            assert two.own == {KEYS[1]}
        found: list[frozenset[ChunkKey]] = []
        thread = threading.Thread(target=lambda: found.append(store.claim(KEYS[:2]).own))
        thread.start()
        thread.join()
        assert found == [frozenset()]
    with store.claim(KEYS) as again:
        assert again.own == frozenset()
        one.close()
    with store.claim(KEYS) as last:
        assert (last.keys, last.own) == (frozenset(KEYS), frozenset())


def test_threads_share_no_key(store: ChunkStore) -> None:
    held: list[int] = []
    worst: list[int] = []

    def work() -> None:
        for _ in range(100):
            with store.claim(KEYS[:1]) as claim:
                if claim.keys:
                    held.append(1)
                    worst.append(len(held))
                    held.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert max(worst) == 1


def hold(path: str, held: Any) -> None:
    with ChunkStore(path).claim(KEYS[:2]):
        held.set()
        time.sleep(600)


def test_a_claim_of_a_process_ends_with_it(tmp_path: Path) -> None:
    with ChunkStore(tmp_path) as store:
        held = SPAWN.Event()
        process = SPAWN.Process(target=hold, args=(str(tmp_path), held))
        process.start()
        assert held.wait(60)
        with store.claim(KEYS) as claim:
            assert claim.keys == set(KEYS[2:])
        process.kill()
        process.join()
        with store.claim(KEYS) as claim:
            assert claim.keys == set(KEYS)


def test_who_has_claimed_a_chunk_is_told_and_whether_it_is_stopped(tmp_path: Path) -> None:
    with ChunkStore(tmp_path) as store:
        with claimed_and_stopped(tmp_path, KEYS[:2]) as pid:
            with store.claim(KEYS[2:]):
                assert store.claimants(KEYS[1:]) == Holders((pid,), (pid,))
                assert store.claimants(KEYS[2:]) == Holders()
            assert f"process {pid} (" in str(store.claimants(KEYS))
            assert str(store.claimants(KEYS)).endswith(", stopped")
            os.kill(pid, signal.SIGCONT)
            assert store.claimants(KEYS).pids == (pid,)
        assert store.claimants(KEYS) == Holders()


def test_without_locks_every_key_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fcntl, "F_OFD_SETLK")
    with ChunkStore(tmp_path) as store, store.claim(KEYS), store.claim(KEYS) as claim:
        assert claim.keys == set(KEYS)
