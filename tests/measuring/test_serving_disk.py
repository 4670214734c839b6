"""The benchmark of serving: chunks that are read from disk, at its speed and at a slower one."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent.parent / "store"))
from served import on_disk
from served.disk import SLOWED_PROMPTS, TRIED, disk_table, from_disk
from served.on_disk import SlowedReads, leave_memory, slow_down
from served.plan import FROM_DISK, PHASES, SETTINGS, SLOWED, SLOWED_SETTING, Cell, cells
from served.report import table
from served.run import Amounts, Run
from served.targets import Answer
from served.workload import Workload
from speed.shapes import letters, tokenizer
from store_samples import sample

from cachetune_rag.readahead.prefetcher import Prefetcher
from cachetune_store import ChunkStore

CHUNK = 32
PLAIN = 0.5
READ = 3000
"""Bytes that a prompt's chunks are read from disk."""


class Server:
    """Reads a prompt in half a second. Leaves it to that, as the connector does, where it has measured a disk that takes longer; tries one of eight all the same."""

    def __init__(self, rate: float = 30_000.0) -> None:
        self.engine, self.asked, self.called = self, list[tuple[tuple[int, ...], Any]](), list[Any]()
        self.true_rate = self.rate = rate
        self.measured: float | None = None
        self.slow, self.memory = 0, True

    async def collective_rpc(self, name: str, args: tuple[Any, ...] = ()) -> list[Any]:
        self.called.append((name, *args))
        if name == "leave_memory":
            self.memory = False
        elif name == "slow_disk":
            self.rate = self.true_rate if args[0] is None else args[0]
        return [self.measured] if name == "disk_speed" else [None]

    async def forget(self) -> None:
        self.called.append("forgotten")

    async def ask(self, ids: list[int], tokens: int, reuse: Any) -> Answer:
        assert (tokens, self.memory) == (1, False)
        self.asked.append((tuple(ids), reuse))
        if reuse == {"reuse": False}:
            return Answer(PLAIN, [], {"reused": 0, "left": "asked"})
        self.memory = True
        if self.measured and READ / self.measured > PLAIN:
            self.slow += 1
            if self.slow % TRIED:
                return Answer(1.01 * PLAIN, [], {"reused": 0, "left": "slow disk", "why": "slow"})
        self.measured = self.rate
        timings = {"lookup": 0.01}
        return Answer(
            READ / self.rate, [], {"reused": 7, "bytes_read": {"disk": READ}, "ttft": 0.2, "timings": timings}
        )


def measured(server: Server, detail: str = "", setting: str = SLOWED_SETTING, rounds: int = 3) -> dict[str, Any]:
    workload = Workload(tokenizer(), letters("stored", 16, CHUNK))
    run = Run({"int4": workload, "exact": workload}, Amounts(rounds, 1, 1, 1), lambda *_server: None)
    target: Any = server
    return asyncio.run(run.measure(target, Cell("reuse", "disk", 4 * CHUNK, setting, detail)))


def test_prompts_are_asked_with_reuse_and_without_and_nothing_is_in_memory() -> None:
    server = Server()
    found = measured(server)
    settings = FROM_DISK[SLOWED_SETTING].asked
    both = [settings, {"reuse": False}]
    assert [reuse for _, reuse in server.asked] == [*both, *reversed(both)] * 2
    assert [ids for ids, _ in server.asked[::2]] == [ids for ids, _ in server.asked[1::2]]
    assert len({ids for ids, _ in server.asked}) == 4
    assert server.called == [("leave_memory",), "forgotten"] * 8 + [("disk_speed",)]
    assert found["reused"] == {
        "ttft": {"median": 0.1, "samples": [0.1] * 3}, "without_reuse": {"median": 0.5, "samples": [0.5] * 3},
    }  # fmt: skip
    assert (found["disk_speed"], found["bytes_read"], found["left"]) == (30_000.0, READ, {})
    assert "left_to_vllm" not in found
    assert [each["counts"] for each in found["of_each"]] == [False, True, True, True]
    assert [(each["in_worker"], each["timings"]) for each in found["of_each"]] == [(0.2, {"lookup": 0.01})] * 4


def test_a_slowed_disk_takes_three_times_as_long_as_vllm_and_the_server_has_to_find_it_out() -> None:
    server = Server()
    found = measured(server, SLOWED)
    assert found["slowed_to"] == 2000.0  # half a second for 3,000 bytes would be 6,000 a second
    slowed = [place for place, called in enumerate(server.called) if called == ("slow_disk", 2000.0)]
    assert slowed == [8]  # two prompts, both ways
    assert server.called[-1] == ("slow_disk", None)
    left = [each.get("left") for each in found["of_each"]]
    assert left == [None, *["slow disk"] * (TRIED - 1), None]
    assert len(left) == SLOWED_PROMPTS
    assert found["reused"]["ttft"]["samples"] == [1.5, 1.5]
    assert found["left_to_vllm"]["ttft"]["samples"] == [0.505] * 7
    assert found["left_to_vllm"]["without_reuse"]["median"] == 0.5
    assert (found["disk_speed"], found["left"]) == (2000.0, {"slow disk": 7})


def test_a_disk_that_is_slow_already_is_tried_as_often_as_the_server_tries_it() -> None:
    server = Server(rate=1000.0)
    server.measured = 1000.0
    found = measured(server, SLOWED)
    assert [called for called in server.called if called[0] == "slow_disk"] == [
        ("slow_disk", found["slowed_to"]),
        ("slow_disk", None),
    ]
    assert found["slowed_to"] == 2000.0  # by the one of the first eight prompts that was read
    assert len(server.asked) == 2 * (TRIED + SLOWED_PROMPTS)


def test_where_nothing_is_read_no_slower_disk_is_measured() -> None:
    class Leaving(Server):
        async def ask(self, ids: list[int], tokens: int, reuse: Any) -> Answer:
            return Answer(PLAIN, [], {"reused": 0, "left": "few"})

    server = Leaving()
    with pytest.raises(ValueError, match=f"none of {TRIED} prompts read chunks from disk.*'left': 'few'"):
        measured(server, SLOWED)
    assert not any(called[0] == "slow_disk" for called in server.called)


def test_the_disk_is_as_quick_as_before_where_a_cell_breaks_off() -> None:
    class Breaking(Server):
        async def ask(self, ids: list[int], tokens: int, reuse: Any) -> Answer:
            if self.rate != self.true_rate:
                raise RuntimeError("vLLM has ended")
            return await super().ask(ids, tokens, reuse)

    server = Breaking()
    with pytest.raises(RuntimeError, match="vLLM has ended"):
        measured(server, SLOWED)
    assert server.rate == server.true_rate


def test_what_was_in_memory_all_the_same_is_told() -> None:
    class Remembering(Server):
        async def ask(self, ids: list[int], tokens: int, reuse: Any) -> Answer:
            answer = await super().ask(ids, tokens, reuse)
            return Answer(answer.ttft, [], {"reused": 7, "bytes_read": {"disk": READ - 10, "host": 10}})

    found = measured(Remembering())
    assert (found["bytes_read"], found["bytes_in_memory"]) == (READ - 10, 10)


def test_of_several_workers_the_slowest_one_counts_and_none_that_has_not_measured() -> None:
    class Two(Server):
        others: float | None = 10.0

        async def collective_rpc(self, name: str, args: tuple[Any, ...] = ()) -> list[Any]:
            return [*(await super().collective_rpc(name, args)), self.others]

    server: Any = Two()
    assert asyncio.run(from_disk(server, [[1], [2]], {}))["disk_speed"] == 10.0
    server.others = None
    assert asyncio.run(from_disk(server, [[1], [2]], {}))["disk_speed"] is None


def test_slowed_disks_come_last_since_servers_remember_them() -> None:
    planned = [cell for cell in cells(PHASES, [1024, 2048], list(SETTINGS)) if cell.variant == "reuse"]
    assert [cell.name for cell in planned][-2:] == [f"reuse/disk/{n}/{SLOWED_SETTING}/{SLOWED}" for n in (1024, 2048)]
    on_it = [cell for cell in planned if cell.phase == "disk"]
    assert planned[-len(on_it) :] == on_it  # chunks aren't in memory behind them
    assert [cell.setting for cell in on_it[:-2]] == [*FROM_DISK, *FROM_DISK]


def test_reads_take_as_long_as_the_slower_disk_gives_their_bytes_one_behind_the_other() -> None:
    now, slept = 10.0, list[float]()

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    def takes(seconds: float, count: int) -> Any:
        def read() -> int:
            nonlocal now
            now += seconds
            return count

        return read

    slowed = SlowedReads(1000.0, lambda: now, sleep)
    assert slowed.read(takes(0.5, 2000)) == 2000
    assert (now, slept) == (12.0, [1.5])
    now = 11.0  # another thread, which began a second before that end
    slowed.read(takes(0.0, 500))
    assert now == 12.5
    now = 20.0  # the disk has rested, and gives no more than its rate for that
    slowed.read(takes(0.0, 500))
    assert now == 20.5
    slowed.read(takes(3.0, 500))  # the real one is slower still
    assert (now, slept[-1]) == (23.5, 0.0)


def test_a_slowed_disk_gives_the_same_rows_and_chunks_leave_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = list[int]()

    class Counting:
        def __init__(self, rate: float) -> None:
            self.rate = rate

        def read(self, count: Any) -> int:
            counted.append(count())
            return counted[-1]

    monkeypatch.setattr(on_disk, "SlowedReads", Counting)
    chunks = [sample(seed) for seed in range(4)]
    with ChunkStore(tmp_path, host_budget="1MiB") as store:
        for chunk in chunks:
            chunk.put(store)
        prefetcher = Prefetcher(store)
        settled = list[int]()  # chunks in memory by then
        monkeypatch.setattr(store, "settle_memory", lambda: settled.append(len(store.keys_in_memory())))

        def tiers() -> list[str]:
            found = []
            for chunk in chunks:
                with store.open(chunk.key) as reader:
                    found.append(reader.tier)
                    assert reader.promote()
                    rows = [
                        reader.read(layer, reader.layout.tokens).clone() for layer in range(len(reader.layout.layers))
                    ]
                rows_of.setdefault(chunk.key, []).append(rows)
            return found

        rows_of: dict[Any, list[Any]] = {}
        try:
            leave_memory(store, prefetcher)
            assert tiers() == ["disk"] * 4
            assert tiers() == ["host"] * 4
            assert not counted
            slow_down(1e6)
            leave_memory(store, prefetcher)
            assert store.keys_in_memory() == []
            assert settled == [0, 0]
            assert tiers() == ["disk"] * 4
            assert sum(counted) > 0
            read = len(counted)
            slow_down(None)
            leave_memory(store, prefetcher)
            request = prefetcher.priority()
            request.claim()  # so that nothing is read yet of what is to be read in the background
            prefetcher.fetch(lambda: [chunk.key for chunk in chunks])
            while len(prefetcher.coming) < 4:
                time.sleep(0.001)
            leave_memory(store, prefetcher)
            request.release()
            assert (prefetcher.coming, tiers()) == (set(), ["disk"] * 4)
            assert len(counted) == read
        finally:
            slow_down(None)
            prefetcher.close()
    for several in rows_of.values():
        assert all(bool((a == b).all()) for rows in several[1:] for a, b in zip(rows, several[0], strict=True))


def test_the_table_has_what_was_read_and_what_was_left_beside_vllm() -> None:
    def beside(with_reuse: float, without: float, count: int) -> dict[str, Any]:
        return {
            name: {"median": seconds, "samples": [seconds] * count}
            for name, seconds in (("ttft", with_reuse), ("without_reuse", without))
        }

    groups = {
        "vllm/alone/16384": {"ttft": {"median": 0.6}},
        f"reuse/disk/16384/{SLOWED_SETTING}/{SLOWED}": {
            **beside(0.5, 0.5, 9), "reused": beside(1.5, 0.5, 2), "left_to_vllm": beside(0.505, 0.5, 7), "left": {"slow disk": 7},
            "slowed_to": 3e8, "disk_speed": 2.9e8, "bytes_read": 5e8,
        },
        "reuse/disk/16384/frequency 0.15": {
            **beside(0.5, 0.5, 3), "left_to_vllm": beside(0.5, 0.5, 3), "left": {"slow disk": 3}, "disk_speed": 1.5e9,
        },
        "reuse/disk/16384/frequency 0.15 int4": {
            **beside(0.25, 0.5, 3), "reused": beside(0.25, 0.5, 3), "left": {}, "disk_speed": 1.5e9, "bytes_read": 5e8,
            "bytes_in_memory": 0,
        },
    }  # fmt: skip
    content = {
        "groups": groups, "environment": {"gpu": "a card", "commit": "abc"},
        "machine": {"disk_bytes_per_second": 1.6e9, "disk_direct": True},
    }  # fmt: skip
    lines = disk_table(content)
    assert lines[5:8] == [
        "| 16,384 | frequency 0.15, `int4` | 1.60 | 1.50 | 0.50 | 3 | 250.0 | 500.0 | 2.00x | 2.40x |  |  |  |  |",
        "| 16,384 | frequency 0.15 | 1.60 | 1.50 |  |  |  |  |  |  | 3 (slow disk) | 500.0 | 500.0 | 1.00x |",
        "| 16,384 | frequency 0.15, `int4` | 0.30, imitated | 0.29 | 0.50 | 2 | 1,500.0 | 500.0 | 0.33x | 0.40x | 7 (slow disk) | 505.0 | 500.0 | 0.99x |",
    ]
    assert lines[9].startswith("Chunks are read past the page cache.")
    assert "\n".join(lines) in table(content)
    groups["reuse/disk/16384/frequency 0.15 int4"]["bytes_in_memory"] = 2e7
    assert "| 1.50 | 0.50, up to 0.02 more in memory | 3 |" in disk_table(content)[5]
    content["machine"] = {"disk_bytes_per_second": 9e9, "disk_direct": False}
    assert disk_table(content)[9].startswith("Chunks are read from the page cache, so at the speed of memory.")
    assert disk_table({"groups": {}}) == []
