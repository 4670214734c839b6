"""The benchmark of time to first token: that rows are of what they say, that a cut-off run goes on, and its arithmetic."""

from __future__ import annotations

import copy
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import llama
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import decoding
import speed_report
import ttft_gpu
from peers import KVBoost, PeerMissingError, PrefixCaching
from speed import machine, report, timeline
from speed.plan import PHASES, groups
from speed.results import OtherRunError, Results
from speed.rounds import WARM, rounds
from speed.shapes import SHAPES, letters, tokenizer
from speed.subject import Subject

from cachetune_rag import CacheTune
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.text.prompts.continuations import Continuations

SMALL = ["--shape", "tiny", "--device", "cpu", "--contexts", "256", "--chunk-tokens", "64", "--rounds", "2"]


def run(out: Path, *more: str) -> dict[str, Any]:
    ttft_gpu.main([*SMALL, "--out", str(out), *more])
    content: dict[str, Any] = json.loads(out.read_text())
    return content


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("speed") / "run.json"
    run(out, "--phases", "target", "device", "int8", "disk", "peers")
    return out


def test_every_row_is_of_the_tier_codec_and_ratio_it_names(measured: Path) -> None:
    content = json.loads(measured.read_text())
    found = report.rows_of(content)
    assert not [group for group in content["groups"].values() if "error" in group]
    own = [row for row in found if "selector" in row]
    assert {(row["tier"], row["codec"]) for row in own} == {
        ("host", "exact"), ("device", "exact"), ("host", "int8"), ("disk", "int4"), ("disk", "int8"), ("disk", "exact"),
    }  # fmt: skip
    for row in own:
        assert list(row["bytes_read"]) == [row["tier"]]
        # What is no chunk is computed (the beginning was kept), and a share of what is, rounded down for each of four chunks.
        chosen = row["computed"] - (row["prompt_tokens"] - 256 - 1)
        assert row["ratio"] * 256 - 4 < chosen <= row["ratio"] * 256, row
        assert len(row["ttft"]["samples"]) == 2
        assert row["speedup"] == pytest.approx(row["full"] / statistics.median(row["ttft"]["samples"]), rel=0.01)
        assert row["floors"]["compute"] == row["full"] * row["computed"] / row["prompt_tokens"]
        assert row["floor"] == max(row["floors"].values())
    exact, small = (
        next(
            r["bytes_read"]["host"] for r in own if (r["codec"], r["tier"], r["name"]) == (c, "host", "frequency 0.05")
        )
        for c in ("exact", "int8")
    )
    assert small == 0.625 * exact  # heads of 16 numbers: 16 bytes and a scale of 4 for 32
    assert content["groups"]["target 256 host exact"]["engine_full"]["median"] > 0


def test_a_prompt_has_nothing_but_the_beginning_the_chunks_and_the_query() -> None:
    with Subject("tiny", "cpu", None, [512], 128) as subject:
        ids = subject.ids(512)
        assert len(ids) == 1 + 512 + 3 + 64  # one token between chunks
        assert ids[0] == subject.engine.prompts.first_token == subject.engine.tokenizer.bos_token_id
        assert subject.ids(512, step=-1)[1:129] == ids[-64 - 128 : -64]


def test_no_chunk_goes_on_with_what_another_began() -> None:
    # What a selector recomputes, and the rows that are read, would then depend on which letters happen to be drawn.
    with Subject("tiny", "cpu", None, [4096], 64) as subject:
        find = Continuations(subject.engine.tokenizer)
        for codec in ("exact", "int8", "int4"):
            assert find(subject.engine.prompts.build(query="q", chunks=subject.chunks(4096, codec), prefix="")) == ()
    short = letters("one", 50, 1)
    assert all(len(text) == 1 and text.isalpha() for text in short)


@pytest.mark.parametrize(("share", "chunks"), [(1.0, 5), (0.8, 4), (0.5, 3)])
def test_a_share_of_the_chunks_is_new_text(share: float, chunks: int) -> None:
    with Subject("tiny", "cpu", None, [320], 64, stored=share) as subject:
        subject.store("exact", "host")
        report = subject.reuse("host", 320, "exact", ReuseConfig("none", 0.0))
        assert (report.reused, report.missed) == (64 * chunks, 0)
        assert report.computed + report.prefix_kept == report.prompt_tokens - 64 * chunks


def test_prefix_caching_finds_all_of_the_same_order_and_next_to_nothing_of_another(measured: Path) -> None:
    peers = {r["name"]: r for r in report.rows_of(json.loads(measured.read_text())) if r["phase"] == "peers"}
    same, other = peers["prefix caching, same order"], peers["prefix caching, other order"]
    assert same["reused"] == same["prompt_tokens"] - 64
    assert 1 <= other["reused"] < 5  # the beginning, and letters that happen to be the same
    assert peers["none 0.0"]["computed"] == same["prompt_tokens"] - 256 - 1  # the beginning was kept


def test_a_finished_run_measures_nothing_again_and_another_one_is_refused(measured: Path) -> None:
    before = json.loads(measured.read_text())["groups"]
    assert run(measured, "--phases", "target", "device")["groups"] == before
    with pytest.raises(OtherRunError, match=r"whose settings was .*'rounds': 2.* Remove the file or choose another"):
        ttft_gpu.main([*SMALL, "--rounds", "3", "--out", str(measured)])


def test_a_run_that_is_cut_off_keeps_its_rounds_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, calls, reuse = tmp_path / "run.json", [0], Subject.reuse

    def cut_off(self: Subject, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4 * (WARM + 1) + 1:  # in the second round that counts
            raise KeyboardInterrupt
        return reuse(self, *args)

    monkeypatch.setattr(Subject, "reuse", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(out, "--phases", "target", "int8")
    content = json.loads(out.read_text())
    assert {name: group["rounds"] for name, group in content["groups"].items()} == {"target 256 host exact": 1}
    assert "(of 1)" in report.details(content)
    assert {g["rounds"] for g in run(out, "--phases", "target", "int8")["groups"].values()} == {2}


def test_what_fails_is_noted_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, store = tmp_path / "run.json", Subject.store

    def failing(self: Subject, codec: str, tier: str) -> None:
        if tier == "device":
            raise RuntimeError("no such memory")
        store(self, codec, tier)

    with monkeypatch.context() as patched:
        patched.setattr(Subject, "store", failing)
        content = run(out, "--phases", "target", "device", "int8")
    assert [len(group["rows"]) for group in content["groups"].values()] == [4, 0, 4]
    assert "- device 256 device exact: RuntimeError: no such memory" in report.details(content)
    assert [len(group["rows"]) for group in run(out, "--phases", "device")["groups"].values()] == [4, 4, 4]


def test_no_group_begins_when_the_time_is_up(tmp_path: Path) -> None:
    ttft_gpu.main([*SMALL, "--phases", "target", "--seconds", "0", "--out", str(tmp_path / "run.json")])
    assert not (tmp_path / "run.json").exists()


def test_the_most_wanted_comes_first_and_every_group_has_a_name_of_its_own() -> None:
    every = groups(PHASES, [4096, 8192, 16384, 32768], [0.05, 0.15])
    assert [(g.phase, g.context, g.tier, g.codec) for g in every[:4]] == [
        ("target", c, "host", "exact") for c in (4096, 8192, 16384, 32768)
    ]
    assert [g.phase for g in every] == sorted((g.phase for g in every), key=PHASES.index)
    assert len({g.name for g in every}) == len(every)
    assert {(g.context, g.codec) for g in every if g.phase == "disk"} >= {(16384, "int4"), (32768, "int4")}


# -- rounds ---------------------------------------------------------------------------------------------------------


def test_rounds_take_turns_and_the_first_ones_dont_count() -> None:
    order: list[str] = []

    def way(name: str) -> Callable[[], tuple[float, Any]]:
        def go() -> tuple[float, Any]:
            order.append(name)
            return float(len(order)), SimpleNamespace(timings={"select": 1.0})

        return go

    found = {}
    for _found in rounds({"a": way("a"), "b": way("b"), "c": way("c")}, 3, "cpu", float("inf"), {"c": 1}):
        found = _found
    assert WARM == 2
    assert "".join(order) == "ab" + "ba" + "abc" + "ba" + "ab", "every other round backwards"
    assert found["a"].seconds == [5.0, 9.0, 10.0]
    assert found["a"].split() == {"select": 1.0}
    assert found["c"].seconds == [7.0]


def test_rounds_end_when_the_time_is_up_but_never_without_one_that_counts() -> None:
    def way() -> tuple[float, None]:
        return 0.5, None

    assert len(list(rounds({"a": way}, 5, "cpu", time.perf_counter() - 1))) == 1


# -- tables and plots -----------------------------------------------------------------------------------------------


def test_tables_hold_the_numbers_of_the_file(measured: Path, tmp_path: Path) -> None:
    readme, docs = tmp_path / "README.md", tmp_path / "performance-results.md"
    for path in (readme, docs):
        path.write_text(f"before\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\nafter\n")
    files = [str(measured), str(measured)]
    arguments = [*files, "--readme", str(readme), "--docs", str(docs), "--plot", str(tmp_path / "plots")]
    for _ in range(2):  # the second time over what the first one wrote
        speed_report.main(arguments)
    content = json.loads(measured.read_text())
    row = next(r for r in report.rows_of(content) if r["name"] == "frequency 0.15" and r["tier"] == "host")
    for path in (readme, docs):
        text = path.read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "old" not in text
        assert f"{row['speedup']:.1f}x" in text
        assert f"commit {content['environment']['commit']}" in text
    wide = docs.read_text().splitlines()
    assert any(line.startswith("| 256 | host | exact | `frequency` | 0.15 | ") for line in wide)
    assert [sum(line.startswith(title) for line in wide) for title in ("### ", "**Where the time goes**")] == [2, 1]
    assert all((tmp_path / "plots" / f"run-{name}.svg").stat().st_size > 1000 for name in ("ttft", "speedup"))


def test_the_pages_that_the_command_is_shown_with_have_a_place_for_the_tables() -> None:
    root = Path(speed_report.__file__).parents[1]
    named = re.findall(r"--(?:readme|docs) (docs/\S+)", speed_report.__doc__ or "")
    assert named == re.findall(r"--(?:readme|docs) (docs/\S+)", (root / "docs" / "performance.md").read_text())
    assert len(named) == 2
    for name in named:
        begin, end = (root / name).read_text().split(report.MARKS[0])
        assert "| context | " in end.split(report.MARKS[1])[0]
        assert report.MARKS[1] not in begin


def test_a_file_without_the_marks_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("nothing here")
    with pytest.raises(ValueError, match=r"README\.md has no lines"):
        report.put_between(path, "text")
    assert path.read_text() == "nothing here"


def test_results_are_whole_at_any_moment(tmp_path: Path) -> None:
    results = Results(tmp_path / "a" / "run.json", {"gpu": None}, {"rounds": 1})
    results.put("one", {"rounds": 1, "rows": []})
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["run.json"]
    again = Results(tmp_path / "a" / "run.json", {"gpu": None}, {"rounds": 1})
    assert again.done("one", 1)
    assert not again.done("one", 2)
    with pytest.raises(OtherRunError, match="gpu"):
        Results(tmp_path / "a" / "run.json", {"gpu": "another"}, {"rounds": 1})


# -- timeline -------------------------------------------------------------------------------------------------------


def event(kind: str, name: str, begin: float, end: float, stream: int) -> dict[str, Any]:
    return {"ph": "X", "cat": kind, "name": name, "ts": begin, "dur": end - begin, "args": {"stream": stream}}


def test_a_timeline_tells_copies_under_compute_and_gaps() -> None:
    found = timeline.analyse(
        [
            event("kernel", "gemm", 100, 200, 7),
            event("kernel", "gemm", 203, 300, 7),  # 3 us apart: no gap
            event("kernel", "gemm", 350, 400, 7),
            event("kernel", "place", 190, 230, 9),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 50, 150, 8),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 140, 170, 8),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 310, 330, 8),
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 400, 410, 8),
            {"ph": "i", "cat": "kernel", "ts": 1},
        ]
    )
    assert found == {
        "span": pytest.approx(360e-6),
        "copy": pytest.approx(140e-6),
        "copy_under_compute": pytest.approx(70 / 140),
        "compute": pytest.approx(247e-6),
        "idle": pytest.approx(53e-6),
        "gaps": [1, pytest.approx(50e-6)],
    }
    assert "50% of them under compute" in timeline.summary(found)


def test_a_trace_is_written_and_has_no_device_where_there_is_none(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    found = timeline.profile(lambda: torch.ones(4, 4) @ torch.ones(4, 4), path)
    assert found["span"] == 0
    assert json.loads(path.read_text())["traceEvents"]


# -- what it runs on, and peers -------------------------------------------------------------------------------------


def test_the_yarn_shape_is_one_that_reuse_serves() -> None:
    config = copy.deepcopy(SHAPES["llama-3.1-8b-yarn"])
    config.update(
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 261, "head_dim": 8}
    )  # fmt: skip
    assert config.max_position_embeddings > 131072 + 512
    torch.manual_seed(0)
    with CacheTune(LlamaForCausalLM(config).eval(), tokenizer()) as engine:
        chunks = ["some letters", "and others"]
        engine.precompute(chunks)
        full = engine.full_prefill(query="what?", chunks=chunks).logits
        found = engine.prefill(query="what?", chunks=chunks, ratio=1.0).logits
        assert float((found - full).abs().max()) <= 1e-5


def test_prefix_caching_keeps_its_cache_whatever_is_asked() -> None:
    model = llama()
    ids = torch.randint(5, 261, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    caching = PrefixCaching(model, ids, 8)
    before = [layer.keys.clone() for layer in caching.cache.layers]
    assert caching.request(ids)[1]["reused"] == 32
    assert caching.request([*ids[:20], 7, 7])[1]["reused"] == 20
    assert caching.request(ids[:32])[1]["reused"] == 31  # the last token is computed
    assert caching.request(ids)[1]["reused"] == 32
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(caching.cache.layers, before, strict=True))


def test_a_peer_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvboost", None)
    with pytest.raises(PeerMissingError, match="kvboost is not installed"):
        KVBoost(llama(), ["text"], 4, 0.15)


def test_attention_that_does_not_run_is_not_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "synchronize", lambda _device: None)
    query = torch.randn(1, 2, 64, 16)

    def attend() -> torch.Tensor:  # cuDNN's doesn't run on a CPU
        return torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)

    name, way = machine.fastest_attention(attend, "cuda")
    assert name in ("default", "flash")
    with way():
        attend()


def test_the_disk_is_read_and_left_as_it_was(tmp_path: Path) -> None:
    speed, _direct = machine.disk_speed(tmp_path, size=1 << 26)
    assert speed > 0
    assert not list(tmp_path.iterdir())


def test_decoding_is_timed_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decoding.json"
    decoding.main([*SMALL, "--new-tokens", "4", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    samples = {name: found["samples"] for name, found in row["seconds_a_token"].items()}
    assert {name: len(found) for name, found in samples.items()} == {"transformers": 2, "engine": 2}
    theirs, ours = (row["seconds_a_token"][name]["median"] for name in ("transformers", "engine"))
    assert row["speedup"] == theirs / ours
    assert "| 256 |" in capsys.readouterr().out
