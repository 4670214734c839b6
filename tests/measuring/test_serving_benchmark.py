"""The benchmark of serving: its prompts, its tables and its plots. (Servers are started by the benchmark alone.)"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from served.host_steps import BETWEEN, FROM_ENGINE, FRONT, TO_ENGINE, Notes, Span, Step, waited_for
from served.host_time import host_table
from served.load import closed, most_within
from served.memory import DeviceMemory
from served.plan import PAUSES, PHASES, SETTINGS, Cell, cells
from served.plot import plot
from served.report import table
from served.run import Amounts, Run
from served.targets import Answer, Target
from served.workload import QUERY_TOKENS, Workload
from speed.shapes import letters, tokenizer

CHUNK = 32


@pytest.fixture(scope="module")
def workload() -> Workload:
    return Workload(tokenizer(), letters("stored", 16, CHUNK))


def shown(workload: Workload, ids: list[int]) -> list[str]:
    """The texts of a prompt's chunks."""
    return str(workload.tokenizer.decode(ids, skip_special_tokens=True)).replace(" ", "").split("\n\n")[1:-1]


def test_prompts_show_stored_chunks_in_changing_orders(workload: Workload) -> None:
    stored = {text.replace(" ", "") for text in workload.stored}
    prompts = workload.prompts(8 * CHUNK, 6, "seed")
    assert workload.prompts(8 * CHUNK, 6, "seed") == prompts
    assert workload.prompts(8 * CHUNK, 6, "other") != prompts
    texts = [shown(workload, ids) for ids in prompts]
    assert all(len(each) == 8 and stored.issuperset(each) for each in texts)
    assert len({tuple(each) for each in texts}) == len(texts)
    same = [shown(workload, ids) for ids in workload.prompts(8 * CHUNK, 3, "seed", order="same")]
    assert same[0] == same[1] == same[2]
    assert len({tuple(ids[-QUERY_TOKENS:]) for ids in prompts}) == len(prompts)


def test_prompts_begin_differently_or_alike(workload: Workload) -> None:
    page = 16  # vLLM's smallest
    seeds = [workload.prompts(8 * CHUNK, 20, seed) for seed in ("alone", "saturated")]
    begun = [tuple(ids[:page]) for prompts in (*seeds, workload.covering(8 * CHUNK)) for ids in prompts]
    assert len(set(begun)) == len(begun) == 42
    assert len({tuple(ids[:page]) for ids in workload.prompts(8 * CHUNK, 3, "seed", alike=True)}) == 1
    same = workload.prompts(8 * CHUNK, 3, "seed", order="same", alike=True)
    assert len({tuple(ids[:-QUERY_TOKENS]) for ids in same}) == 1


@pytest.mark.parametrize(("share", "known"), [(1.0, 10), (0.8, 8), (0.0, 0)])
def test_of_a_prompts_chunks_the_wanted_share_is_stored(workload: Workload, share: float, known: int) -> None:
    stored = {text.replace(" ", "") for text in workload.stored}
    for ids in workload.prompts(10 * CHUNK, 4, "shares", share=share):
        assert sum(text in stored for text in shown(workload, ids)) == known


def test_lengths_vary_around_the_context(workload: Workload) -> None:
    counts = [len(shown(workload, ids)) for ids in workload.prompts(6 * CHUNK, 200, "lengths", log_normal=True)]
    assert 5 <= sorted(counts)[100] <= 7
    assert min(counts) < 4
    others = [len(shown(workload, ids)) for ids in workload.prompts(6 * CHUNK, 200, "others", log_normal=True)]
    assert others == counts  # what is compared has the same lengths
    assert 10 < max(counts) <= 16


def content() -> dict[str, Any]:
    """Results of two servers, made up so that every ratio is plain to see."""
    groups: dict[str, Any] = {
        "vllm/alone/4096": {"ttft": {"median": 0.4, "samples": [0.4, 0.39, 0.5]}, "device_memory": 2**33},
        "vllm/saturated/4096": {"requests_per_second": 2.0, "steady_per_second": 3.0, "between_tokens": {"p99": 0.05}},
        "vllm/arrivals/4096//0.9": {
            "rate": 1.8,
            "ttft": {"p50": 1.0, "p95": 1.5, "p99": 2.0},
            "between_tokens": {"p99": 0.06},
            "arrived": [0.0, 1.0],
            "device_memory": 2**33,
        },
        "vllm/arrivals/8192//0.9": {"rate": 0.9, "ttft": {"p50": 1.0, "p99": 2.0}, "between_tokens": {"p99": 0.06}},
    }
    groups["vllm/short/512"] = {"ttft": {"median": 0.024, "samples": [0.02, 0.024, 0.028]}, "load": 1.5}
    groups["reuse/short/512/auto"] = {
        "ttft": {"median": 0.03, "samples": [0.02, 0.03, 0.04]}, "without_reuse": {"median": 0.027, "samples": [0.02, 0.027, 0.03]},
        "left": {"few": 2}, "last_report": {"ratio": 0.15}, "load": 2.0, "device_memory": 2**33,
    }  # fmt: skip
    groups["vllm/paused/4096//50 ms"] = {"ttft": {"median": 0.39, "samples": [0.39]}, "device_memory": 2**33}
    for pause, median in (("no pause", 0.1), ("50 ms", 0.13)):
        groups[f"reuse/paused/4096/frequency 0.05/{pause}"] = {
            "ttft": {"median": median, "samples": [median - 0.01, median, median + 0.01]}, "device_memory": 2**33 + 2**31,
            "timings": {"lookup": 0.001, "select": 0.002, "load": median / 2, "compute": 0.01, "engine": 0.08, "around": 0.02},
        }  # fmt: skip
    groups["ceiling/ceiling/4096"] = {"requests_per_second": 10.0}
    groups["vllm/within/4096"] = {"rate": 0.8, "tries": [{"part": 0.4, "rate": 0.8, "p95": 0.9}]}
    tries = [{"part": 0.6, "rate": 3.0, "p95": 1.5}, {"part": 0.4, "rate": 2.0, "p95": 0.75}]
    groups["reuse/within/4096/default 0.05"] = {"rate": 2.0, "tries": tries}
    groups["reuse/within/4096/default 0.15"] = {"tries": tries[:1]}
    for number, setting in enumerate(SETTINGS, start=1):
        groups[f"reuse/alone/4096/{setting}"] = {
            "ttft": {"median": 0.1 * number, "samples": [0.1 * number, 0.12 * number]}, "device_memory": 2**33 + 2**29,
            "timings": {"lookup": 0.001, "select": 0.003, "load": 0.002, "compute": 0.04, "engine": 0.06, "around": 0.03},
            "last_report": {
                "reused": 30, "prompt_tokens": 40, "ttft": 0.07, "timings": {"lookup": 0.005, "select": 0.006, "load": 0.007, "compute": 0.05},
            },
        }  # fmt: skip
        groups[f"reuse/saturated/4096/{setting}"] = {
            "requests_per_second": 8.0 / number, "steady_per_second": 9.0 / number,
        }  # fmt: skip
        for detail in ("0.9", "2"):
            groups[f"reuse/arrivals/4096/{setting}/{detail}"] = {
                "rate": 2.0 * float(detail), "ttft": {"p50": 0.1, "p95": 0.15, "p99": 0.2 * number}, "between_tokens": {"p99": 0.01},
                "arrived": [0.0, 1.01], "device_memory": 2**33 + 2**30,
            }  # fmt: skip
    return {"groups": groups, "environment": {"gpu": "a card", "vllm": "0.26.0", "commit": "abc"}}


def test_every_stored_chunk_is_asked_for_until_none_is_read_from_disk(workload: Workload) -> None:
    class FromDisk:
        """A server that has a chunk in memory once it was asked for twice."""

        def __init__(self, patience: int) -> None:
            self.patience, self.asked = patience, Counter[str]()

        async def ask(self, ids: list[int], _tokens: int, _reuse: Any) -> Answer:
            found = shown(workload, ids)
            read = sum(self.asked[chunk] < self.patience for chunk in found)
            self.asked.update(found)
            return Answer(0.0, [], {"reused": 1, "bytes_read": {"host": 1, "disk": read}})

    run = Run({"exact": workload}, Amounts(1, 1, 1, 1), lambda *_server: None)
    server = FromDisk(2)
    asyncio.run(run.fill_memory(server, 5 * CHUNK, ["exact"]))
    assert server.asked == dict.fromkeys((text.replace(" ", "") for text in workload.stored), 3)
    with pytest.raises(ValueError, match="still read from disk after every one was asked for 20 times"):
        asyncio.run(run.fill_memory(FromDisk(99), 5 * CHUNK, ["exact"]))


def test_a_server_that_reuses_nothing_is_not_measured(workload: Workload) -> None:
    class Refusing:
        async def ask(self, _ids: list[int], _tokens: int, _reuse: Any) -> Answer:
            return Answer(0.0, [], {"reused": 0, "left": "refused", "why": "its model is odd."})

    run = Run({"exact": workload}, Amounts(1, 1, 1, 1), lambda *_server: None)
    with pytest.raises(ValueError, match=r"reuses nothing.*\(refused\)\. its model is odd\."):
        asyncio.run(run.fill_memory(Refusing(), 5 * CHUNK, ["exact"]))


def test_short_prompts_are_asked_both_ways_in_turn_with_nothing_cached() -> None:
    short = Workload(tokenizer(), letters("short", 8, CHUNK))
    asked: list[tuple[tuple[int, ...], Any]] = []
    forgotten: list[int] = []

    class Server:
        async def forget(self) -> None:
            forgotten.append(len(asked))

        async def ask(self, ids: list[int], _tokens: int, reuse: Any) -> Answer:
            asked.append((tuple(ids), reuse))
            if reuse == {"reuse": False}:
                return Answer(2.0, [], {"reused": 0, "left": "asked"})
            return Answer(1.0, [], {"reused": 0, "left": "few"} if reuse is not None else {})

    run = Run({"exact": short, "short": short}, Amounts(3, 1, 1, 1), lambda *_server: None)
    found = asyncio.run(run.measure(Server(), Cell("reuse", "short", 4 * CHUNK, "auto")))
    assert (found["ttft"]["samples"], found["without_reuse"]["samples"]) == ([1.0] * 3, [2.0] * 3)
    assert found["left"] == {"few": 3}
    assert forgotten == list(range(10))
    assert [ids for ids, _ in asked[::2]] == [ids for ids, _ in asked[1::2]]
    assert [reuse for _, reuse in asked] == [{}, {"reuse": False}, {"reuse": False}, {}] * 2 + [{}, {"reuse": False}]
    asked.clear()
    assert set(asyncio.run(run.measure(Server(), Cell("vllm", "short", 4 * CHUNK)))) == {"ttft"}
    assert [reuse for _, reuse in asked] == [None] * 5


@pytest.mark.parametrize(
    ("setting", "detail"), [("", "50 ms"), ("default 0.05", "no pause"), ("default 0.05", "500 ms")]
)
def test_servers_that_rest_differ_from_others_by_the_pause_alone(
    setting: str, detail: str, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[Any] = []

    class Server:
        async def forget(self) -> None:
            happened.append("forgotten")

        async def ask(self, ids: list[int], tokens: int, reuse: Any) -> Answer:
            happened.append((tuple(ids), tokens, reuse))
            return Answer(1.0)

    async def rest(seconds: float) -> None:
        happened.append(seconds)

    monkeypatch.setattr("served.load.asyncio.sleep", rest)
    run = Run({"exact": workload}, Amounts(3, 1, 1, 1), lambda *_server: None)
    variant: Any = "reuse" if setting else "vllm"
    asyncio.run(run.measure(Server(), Cell(variant, "alone", 4 * CHUNK, setting)))
    alone, happened = happened, []
    asyncio.run(run.measure(Server(), Cell(variant, "paused", 4 * CHUNK, setting, detail)))
    assert len(set(map(str, alone))) == 5
    pause = [PAUSES[detail]] if PAUSES[detail] else []
    assert happened == ["forgotten", *(each for asked in alone for each in (*pause, asked))]


def test_where_the_time_went_is_told_of_all_requests_that_count(workload: Workload) -> None:
    class Server:
        """Takes longer for every request; one is left to vLLM."""

        asked = 0

        async def forget(self) -> None:
            self.asked = 0

        async def ask(self, _ids: list[int], _tokens: int, _reuse: Any) -> Answer:
            self.asked += 1
            if self.asked == 4:
                return Answer(9.0, [], {"reused": 0, "left": "few"})
            timings = {"load": self.asked / 8, "compute": 0.25}
            return Answer(self.asked + 0.5, [], {"reused": 6, "ttft": float(self.asked), "timings": timings})

    run = Run({"exact": workload}, Amounts(4, 1, 1, 1), lambda *_server: None)
    found = asyncio.run(run.measure(Server(), Cell("reuse", "alone", 4 * CHUNK, "default 0.05")))
    medians = {"load": 5 / 8, "compute": 0.25, "engine": 5.0, "around": 0.5}
    assert (found["timings"], found["left"]) == (medians, {"few": 1})
    assert found["last_report"]["timings"] == {"load": 6 / 8, "compute": 0.25}
    each = {"load": [0.375, 0.625, 0.75], "compute": [0.25] * 3, "engine": [3.0, 5.0, 6.0], "around": [0.5] * 3}
    assert found["timings_of_each"] == each
    cell = Cell("reuse", "paused", 4 * CHUNK, "default 0.05", "no pause")
    found = asyncio.run(run.measure(Server(), cell))
    assert (found["timings"], found["timings_of_each"]) == (medians, each)


def test_a_prefix_cache_is_empty_before_it_counts_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        def __init__(self, busy: int):
            self.busy = busy

        async def reset_prefix_cache(self) -> bool:
            self.busy -= 1
            return self.busy < 0

    async def now(_seconds: float) -> None:
        pass

    monkeypatch.setattr("served.targets.asyncio.sleep", now)
    engine = Engine(3)
    asyncio.run(Target(engine).forget())
    assert engine.busy == -1
    with pytest.raises(RuntimeError, match="could not be emptied in 200 tries"):
        asyncio.run(Target(Engine(1000)).forget())


def under(lines: list[str], title: str) -> list[str]:
    """The rows of the table whose title begins so, its head first."""
    start = next(number for number, line in enumerate(lines) if line.startswith(f"**{title}"))
    found = list(itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :]))
    return [found[0], *found[2:]]


def test_tables_hold_each_setting_beside_vllm() -> None:
    lines = table(content()).splitlines()
    names = list(SETTINGS)
    rows = {line.split(" | ")[1]: line for line in under(lines, "Beside vLLM")}
    assert rows["vLLM, all read"].startswith(
        "| 4,096 | vLLM, all read | 400.0 | 1.00x | 2.00 | 1.00x | 20% | 3.00 | 1.00x | 50.0 |"
    )
    assert rows[names[0]].startswith(f"| 4,096 | {names[0]} | 100.0 | 4.00x | 8.00 | 4.00x | 80% | 9.00 | 3.00x |")
    assert rows[names[1]].startswith(f"| 4,096 | {names[1]} | 200.0 | 2.00x | 4.00 | 2.00x | 40% | 4.50 | 1.50x |")
    assert rows["default 0.15, `int8`"].startswith("| 4,096 | default 0.15, `int8` | 600.0 |")
    assert "| first token alone, 4,096 | 5.5x: 4.00x | 4x: 2.00x | 3x: 1.33x |" in lines
    assert "| requests/s, saturated, 4,096 | 3.5x: **4.00x** | 3x: 2.00x | 2.4x: 1.33x |" in lines
    said = "Most memory in use on the device: vllm 8.0 GiB, reuse 10.0 GiB."
    assert any(line.startswith(said) for line in lines)


def test_tables_of_the_first_token_have_its_slowest_and_the_memory() -> None:
    lines = table(content()).splitlines()
    assert under(lines, "One request alone")[1:3] == [
        "| 4,096 | all stored | vLLM, all read | 400.0 | 500.0 | 500.0 | 1.00x | 8.0 |  |",
        "| 4,096 | all stored | frequency 0.05 | 100.0 | 120.0 | 120.0 | 4.00x | 8.5 | +6.2% |",
    ]
    assert under(lines, "After a pause: medians, ms")[:6] == [
        "| context | setting | pause | TTFT median ms | p95 ms | p99 ms | later than without, ms | x | lookup | tokens chosen "
        "| waited for rows | computed | the engine, all | around the engine | memory GiB | over vLLM's |",
        "| 4,096 | vLLM, all read | `alone` | 400.0 | 500.0 | 500.0 |  | 1.00x |  |  |  |  |  |  | 8.0 |  |",
        "| 4,096 | vLLM, all read | 50 ms | 390.0 | 390.0 | 390.0 | -10.0 | 1.00x |  |  |  |  |  |  | 8.0 |  |",
        "| 4,096 | frequency 0.05 | `alone` | 100.0 | 120.0 | 120.0 |  | 4.00x | 1.0 | 3.0 | 2.0 | 40.0 | 60.0 | 30.0 | 8.5 | +6.2% |",
        "| 4,096 | frequency 0.05 | no pause | 100.0 | 110.0 | 110.0 |  |  | 1.0 | 2.0 | 50.0 | 10.0 | 80.0 | 20.0 | 10.0 | +25.0% |",
        "| 4,096 | frequency 0.05 | 50 ms | 130.0 | 140.0 | 140.0 | +30.0 | 3.00x | 1.0 | 2.0 | 65.0 | 10.0 | 80.0 | 20.0 | 10.0 | +25.0% |",
    ]
    assert under(lines, "Short prompts, as by default")[1:] == [
        "| 512 | 24.0 | 28.0 | 28.0 | 30.0 | 40.0 | 40.0 | 0.80x | 27.0 | 30.0 | 30.0 | 0.90x | 1 reused at r 0.15, 2 (few) left to vLLM | 1.5; 2 | 8.0 |",
    ]


def test_where_the_time_went_is_of_all_requests_or_says_that_it_is_of_the_last() -> None:
    found, title = content(), "Where the time of one request alone went"
    of_all = "| 4,096 | frequency 0.05 | 72.7 | 100.0 | 1.0 | 3.0 | 2.0 | 40.0 | 100.0 | 60.0 | 30.0 | all: medians |"
    assert under(table(found).splitlines(), title)[1] == of_all
    del found["groups"]["reuse/alone/4096/default 0.05"]["timings"]  # as older files have it
    rows = under(table(found).splitlines(), title)
    of_last = "| 4,096 | default 0.05 | 100.0 | 240.0 | 5.0 | 6.0 | 7.0 | 50.0 | 100.0 | 70.0 | 170.0 | the last |"
    assert rows[1:3] == [of_all, of_last]


def test_tables_of_servers_with_many_requests_have_p95_and_p99_beside_vllms() -> None:
    found = content()
    lines = table(found).splitlines()
    came = under(lines, "Requests that arrive independently of each other")
    assert came[1] == "| 4,096 | 0.9 | vLLM, all read | 1.80 | 1,000.0 | 1,500.0 | 2,000.0 | 1.00x | 60.0 | 8.0 |  |"
    assert came[2] == "| 4,096 | 0.9 | frequency 0.05 | 1.80 | 100.0 | 150.0 | 200.0 | 10.00x | 10.0 | 9.0 | +12.5% |"
    assert came[-1] == "| 8,192 | 0.9 | vLLM, all read | 0.90 | 1,000.0 |  | 2,000.0 | 1.00x | 60.0 |  |  |"
    assert "| 4,096 | 2 | default 0.05 | 4.00 | 100.0 | 150.0 | 400.0 |  | 10.0 | 9.0 | +12.5% |" in came
    assert "4,096 tokens, 0.9 times vLLM's most: requests came at the same times, at most 10 ms apart." in lines
    found["groups"]["reuse/arrivals/4096/default 0.05/0.9"]["arrived"] = [0.0, 3.0]
    said = "4,096 tokens, 0.9 times vLLM's most: requests came at other times in each row, up to 2.0 s apart."
    assert said in table(found).splitlines()
    found["groups"]["reuse/arrivals/4096/default 0.05/0.9"]["left"] = {"few": 2, "missed": 1}
    found["groups"]["reuse/gaps/4096/default 0.05"] = {"gaps": {"p99": 0.05}, "arriving": {"left": {"few": 5}}}
    changed = table(found).splitlines()
    came = under(changed, "Requests that arrive independently of each other")
    assert sum(line.endswith("| 2 (few), 1 (missed) | 9.0 | +12.5% |") for line in came) == 1
    (row,) = (line for line in under(changed, "Beside vLLM") if "default 0.05 |" in line)
    assert row.endswith("| 50.0 | beside four: 5 (few) |")
    assert "| 4,096 | default 0.05 | 2.00 | 2.50x | 1.00x | 1,500 at 3.00, 750 at 2.00 |" in lines
    assert "| 4,096 | default 0.15 | below 3.00 |  |  | 1,500 at 3.00 |" in lines
    assert "| 4,096 | all stored | frequency 0.05 | 8.00 | 4.00x |  |" in lines
    each = under(lines, "What a request takes of a saturated server, ms")[1]
    assert each.startswith("| 4,096 | 500.0 | 100.0 | 125.0 (wanted: 142.9) |")


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("serving-*.json")),
    ids=lambda path: path.stem,
)
def test_files_of_runs_have_tables(path: Path) -> None:
    found = json.loads(path.read_text())
    lines = table(found).splitlines()
    assert found["environment"]["commit"] in lines[0]
    rows = {"alone": ("One request alone", "| all stored |"), "disk": ("Chunks on disk", "")}
    measured = [phase for phase in rows if any(f"/{phase}/" in name for name in found["groups"])]
    assert measured
    for phase in measured:
        title, of_cells = rows[phase]
        _, *shown = under(lines, title)
        assert sum(of_cells in line for line in shown) == sum(f"/{phase}/" in name for name in found["groups"])


def test_plots_are_made_of_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = content()
    made = plot(found, tmp_path, "serving")
    assert [path.name for path in made] == ["serving-ratios.svg", "serving-arrivals.svg"]
    drawn = made[0].read_text() + made[1].read_text()
    assert all(f"<!-- {name} -->" in drawn for name in (*SETTINGS, "vLLM, all read", "4.0x", "2.0x", "1.3x"))
    assert "8,192" not in drawn  # nothing with reuse was measured there
    for name in [name for name in found["groups"] if "arrivals" in name]:
        del found["groups"][name]
    assert [path.name for path in plot(found, tmp_path / "fewer", "serving")] == ["serving-ratios.svg"]


def test_every_phase_and_setting_has_cells_and_no_cell_comes_twice() -> None:
    names = [cell.name for cell in cells(PHASES, [1024], list(SETTINGS))]
    assert len(names) == len(set(names))
    assert {name.split("/")[1] for name in names} == set(PHASES)
    assert all(f"reuse/{phase}/1024/{each}" in names for phase in ("alone", "saturated") for each in SETTINGS)
    exact = [name for name, setting in SETTINGS.items() if setting.codec == "exact"]
    assert all(f"reuse/{phase}/1024/{each}" in names for phase in ("gaps", "within") for each in exact)
    rested = {
        f"{server}/{pause}" for server in ("vllm/paused/1024/", "reuse/paused/1024/default 0.05") for pause in PAUSES
    }
    assert rested < set(names)
    longer = {cell.name for cell in cells(["paused"], [1024, 2048], ["frequency 0.05", "default 0.15"])}
    assert {name for name in longer if "2048" in name} == {
        "vllm/paused/2048//50 ms", *(f"reuse/paused/2048/frequency 0.05/{pause}" for pause in PAUSES),
    }  # fmt: skip


def test_requests_without_stored_chunks_give_no_settings_and_are_told_why_they_were_left(workload: Workload) -> None:
    asked: list[Any] = []

    class Server:
        async def ask(self, _ids: list[int], _tokens: int, reuse: Any) -> Answer:
            asked.append(reuse)
            return Answer(0.1, [1.0], {"reused": 0, "left": "nothing found"} if reuse == {} else {})

    run = Run({"exact": workload}, Amounts(1, 6, 2, 4), lambda *_server: None)
    found = asyncio.run(run.measure(Server(), Cell("reuse", "shares", 4 * CHUNK, "auto", "stored 0")))
    assert (asked, found["left"]) == ([{}] * 10, {"nothing found": 6})


@pytest.mark.parametrize(
    ("holds", "tried"),
    [(0.85, [0.6, 0.9, 0.8]), (1.0, [0.6, 0.9, 1.0]), (0.1, [0.6, 0.3, 0.2]), (0.5, [0.6, 0.3, 0.4])],
)
def test_the_highest_rate_is_found_at_which_nearly_all_first_tokens_come_in_time(
    holds: float, tried: list[float]
) -> None:
    async def at(part: float) -> dict[str, Any]:
        return {"rate": 5 * part, "ttft": {"p95": 0.9 if part <= holds else 1.1}}

    found = asyncio.run(most_within(at))
    assert [each["part"] for each in found["tries"]] == tried
    kept = [part for part in tried if part <= holds]
    assert found.get("rate") == (5 * max(kept) if kept else None)


def test_steady_rates_leave_out_what_begins_and_ends_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("served.load.time.perf_counter", lambda: now)
    asked: list[asyncio.Future[Answer]] = []

    class Server:
        def ask(self, ids: list[int], _tokens: int, _reuse: Any) -> asyncio.Future[Answer]:
            asked.append(asyncio.get_running_loop().create_future())
            return asked[-1]

    async def measured(ends: list[float]) -> dict[str, Any]:
        nonlocal now
        now = 0.0
        asked.clear()
        task = asyncio.create_task(closed(Server(), [[number] for number in range(len(ends))], None, 1, 2))
        for number, end in enumerate(ends):
            while len(asked) <= number:
                await asyncio.sleep(0)
            now = end
            asked[number].set_result(Answer(0.0, [1.0]))
            await asyncio.sleep(0)
        return await task

    # Two clients: the last of six prompts is asked at 6 s, when four are answered, three of them since the first one's end.
    found = asyncio.run(measured([3.0, 4.0, 5.0, 6.0, 20.0, 30.0]))
    assert found["requests_per_second"] == 6 / 30
    assert found["steady_per_second"] == 3 / 3
    assert asyncio.run(measured([3.0, 4.0]))["steady_per_second"] is None


@pytest.mark.parametrize(("phase", "detail", "rates"), [("arrivals", "0.9", [1.8]), ("within", "", [1.2, 1.8, 2.0])])
def test_requests_of_all_servers_and_settings_arrive_at_the_same_times(
    phase: str, detail: str, rates: list[float], workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, pause = 0.0, asyncio.sleep
    came: list[float] = []

    async def sleep(seconds: float) -> None:
        nonlocal now
        await pause(0)  # what was asked before begins before time passes
        now += seconds

    class Server:
        async def ask(self, _ids: list[int], _tokens: int, _reuse: Any) -> Answer:
            came.append(now)
            return Answer(0.1, [1.0])

    monkeypatch.setattr("served.load.time.perf_counter", lambda: now)
    monkeypatch.setattr("served.load.asyncio.sleep", sleep)
    run = Run({"exact": workload}, Amounts(1, 12, 1, 1), lambda *_server: 2.0)
    exact = [name for name, setting in SETTINGS.items() if setting.codec == "exact"]
    found = []
    for cell in (Cell("vllm", phase, 64, "", detail), *(Cell("reuse", phase, 64, name, detail) for name in exact)):
        now, came = 0.0, []
        asyncio.run(run.measure(Server(), cell))
        measured = [came[start : start + 12] for start in range(0, len(came), 12)]
        assert [11 / (times[-1] - times[0]) for times in measured] == pytest.approx(rates)
        found.append([at - times[0] for times in measured for at in times])
    assert len(found) == 4
    assert all(times == pytest.approx(found[0]) for times in found)
    pauses = [after - before for before, after in itertools.pairwise(found[0][:12])]
    assert max(pauses) > 2 * min(pauses)


def test_prompts_of_a_setting_show_chunks_in_its_codec(workload: Workload) -> None:
    """And a cell whose rates depend on another one says so where that is missing."""
    encoded = Workload(tokenizer(), letters("encoded", 16, CHUNK))
    asked: list[tuple[list[str], Any]] = []

    class Server:
        async def ask(self, ids: list[int], _tokens: int, reuse: Any) -> Answer:
            asked.append((shown(workload, ids), reuse))
            return Answer(0.0)

    run = Run({"exact": workload, "int8": encoded}, Amounts(1, 1, 1, 1), lambda *_server: None)
    for name, setting in SETTINGS.items():
        asked.clear()
        asyncio.run(run.measure(Server(), Cell("reuse", "alone", 4 * CHUNK, name)))
        texts = {text.replace(" ", "") for text in (encoded if setting.codec == "int8" else workload).stored}
        assert asked
        assert all(texts.issuperset(found) and reuse == setting.asked for found, reuse in asked)
    with pytest.raises(ValueError, match=r"\(reuse default 0.05\): measure the phase saturated first"):
        asyncio.run(run.measure(Server(), Cell("reuse", "within", 4 * CHUNK, "default 0.05")))


def test_without_a_gpu_no_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with DeviceMemory() as memory:
        pass
    assert memory.most is None


def test_the_most_memory_that_was_in_use_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([70, 20])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (next(free, 60), 100))
    with DeviceMemory() as memory:
        while memory.most != 80:
            pass
    assert memory.most == 80


def test_of_steps_at_one_time_the_one_that_is_waited_for_counts() -> None:
    spans = [
        Span("prompt checked and taken in", 10.0, 11.0),
        Span("request made, pages hashed", 12.0, 13.0),
        Span("step scheduled", 14.0, 16.0),
        Span("pages allocated", 14.5, 15.0),
        Span("step run, forward queued", 17.0, 25.0),
        Span("thread waited for, while it rests", 18.0, 24.0),
        Span("chunks opened", 19.0, 22.0),
        Span("report made", 23.5, 26.0),  # from 24 to 25, the loop does something else
        Span("step scheduled", 40.0, 41.0),  # of a later request
    ]
    found = waited_for(spans, 10.0, 30.0)
    assert found == pytest.approx(
        {
            "prompt checked and taken in": 1.0,
            TO_ENGINE: 2.0,
            "request made, pages hashed": 1.0,
            "step scheduled": 1.5,
            "pages allocated": 0.5,
            BETWEEN: 1.0,
            "step run, forward queued": 2.0,
            "thread waited for, while it rests": 2.5,
            "chunks opened": 3.0,
            "report made": 1.5,
            FROM_ENGINE: 4.0,
        }
    )
    assert sum(found.values()) == pytest.approx(20.0)
    assert FRONT[0].name in found


def test_functions_note_when_they_begin_and_end_and_what_this_vllm_lacks_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = ModuleType("noted_here")
    module.Owner = type("Owner", (), {"double": lambda self, number: 2 * number})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    places = ("noted_here", "Owner.double"), ("noted_here", "Owner.gone"), ("noted_here.gone", "Owner.double")
    notes = Notes([Step(place[-1] + place[0], True, place) for place in places])
    before = time.perf_counter()
    assert module.Owner().double(4) == 8
    (span,) = notes.take()
    assert (span.name, before <= span.start <= span.end) == ("Owner.doublenoted_here", True)
    assert notes.take() == []
    assert notes.absent == ["Owner.gonenoted_here", "Owner.doublenoted_here.gone"]


def test_the_table_of_host_time_has_a_column_a_prompt_and_sums() -> None:
    groups = {
        "vllm/alone/4096": {"ttft": {"median": 0.4}},
        "vllm/host/64": {
            "ttft": {"median": 0.01}, "engine_steps": 2, "absent": [], "host_steps": {"step scheduled": 0.01},
        },
        "reuse/host/4096/frequency 0.05": {
            "ttft": {"median": 0.05}, "engine_steps": 4, "absent": ["pages cached"],
            "host_steps": {"step scheduled": 0.02, BETWEEN: 0.01, "chunks opened": 0.015, "report made": 0.005},
        },
    }  # fmt: skip
    assert host_table(groups) == [
        "",
        "| step, ms of one request alone | whose | vllm 64 | reuse 4096 frequency 0.05 |",
        "| --- | --- | --- | --- |",
        "| step scheduled | vLLM's | 10.00 | 20.00 |",
        "| chunks opened | ours | 0.00 | 15.00 |",
        "| report made | ours | 0.00 | 5.00 |",
        "| loop between steps | vLLM's | 0.00 | 10.00 |",
        "| all of these | ours | 0.00 | 20.00 |",
        "| all of these | vLLM's | 10.00 | 30.00 |",
        "| time to first token |  | 10.00 | 50.00 |",
        "| vLLM's steps | | 2 | 4 |",
        "This vLLM has no function of these names: pages cached.",
    ]
    assert host_table({"vllm/alone/4096": groups["vllm/alone/4096"]}) == []
    assert table(content() | {"groups": groups}).endswith("\n".join(host_table(groups)))
