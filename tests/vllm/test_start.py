"""What a worker works out when it starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cachetune_rag import CacheTune, ConfigError, ModelLoadError, UnsupportedModelError
from cachetune_rag.model.heads import ALL_HEADS
from cachetune_rag.reuse.config import resolve
from cachetune_rag.selection import selector_names
from cachetune_vllm.messages import Hello
from cachetune_vllm.prompt_memory import KEPT_FREE, SLACK, left_by_vllm, needed_for, room_in, settled
from cachetune_vllm.recognition import Recognition
from cachetune_vllm.resting import ASKS_FOR, rest_between_steps
from cachetune_vllm.settings import ServerSettings
from cachetune_vllm.start import Started, settled_ratios, start_worker, unsupported
from cachetune_vllm.warm_up import expected, warm_up
from tests import tiny
from tests.vllm.conftest import heard

ROW = 128 << 10
"""Bytes of a token's keys and values in a model of Llama-3.1-8B's shape."""


GIB = 1 << 30


@pytest.mark.parametrize(("left", "tokens"), [(0, 0), (KEPT_FREE, 0), (KEPT_FREE + 10 * GIB, 49152)])
def test_prompts_fit_into_what_vllm_leaves_free(left: int, tokens: int) -> None:
    assert room_in(left) // ROW == tokens
    assert room_in(left + 2 * GIB, chunks=2 * GIB) // ROW == tokens
    assert room_in(needed_for(tokens * ROW, chunks=GIB), chunks=GIB) // ROW == tokens


def test_what_vllm_has_not_taken_yet_of_its_share_is_its_own() -> None:
    assert left_by_vllm(30 * GIB, 100 * GIB, 0.75) == 25 * GIB
    assert left_by_vllm(20 * GIB, 100 * GIB, 0.75) == 20 * GIB  # somebody else is on the card
    assert left_by_vllm(30 * GIB, 100 * GIB, None) == 30 * GIB  # --kv-cache-memory-bytes


@pytest.mark.parametrize(
    ("asked", "left", "room"),
    [
        ("auto", 80 * GIB, 4 * GIB + SLACK),
        ("auto", 3.5 * GIB, 1.5 * GIB),
        ("5GiB", 80 * GIB, 5 * GIB),
        (0.5 * GIB, 80 * GIB, GIB // 2),
    ],
)
def test_prompts_take_one_of_the_longest_at_most_or_what_the_operator_says(
    asked: Any, left: float, room: float, caplog: pytest.LogCaptureFixture
) -> None:
    asked = asked if isinstance(asked, str) else int(asked)
    found = settled(asked, left=int(left), total=96 * GIB, chunks=0, row_bytes=ROW, longest=32768)
    assert found == room
    warned = [each for each in caplog.messages if "are left to vLLM" in each]
    assert bool(warned) == (room < 4 * GIB)  # the longest prompt of the server needs as much
    helps = "prompt_memory 4 GiB" if left == 80 * GIB else "--gpu-memory-utilization"
    assert not warned or f"What helps: {helps}" in warned[0]


def test_a_server_says_at_its_start_what_its_longest_prompts_lack(caplog: pytest.LogCaptureFixture) -> None:
    given = {"chunks": 0, "row_bytes": ROW, "longest": 32768}
    assert settled("auto", left=4 * GIB, total=96 * GIB, **given) // ROW == 14745
    (said,) = (each for each in caplog.messages if "are left to vLLM" in each)
    # 4 GiB are 60% of 6.7 GiB, and 1 GiB is kept free: 7.7 of 96 GiB.
    assert "more than 14745 tokens" in said
    assert "--gpu-memory-utilization 0.92, by which vLLM leaves 7.667 GiB of the GPU and not 4 GiB" in said
    with pytest.raises(ConfigError, match=r"prompt_memory is '4GiB'.* may take 1.8 GiB: .* let vLLM leave 7.667 GiB"):
        settled("4GiB", left=4 * GIB, total=96 * GIB, **given)


def config(**options: Any) -> Any:
    """The parts of vLLM's configuration that decide whether chunks can be reused."""
    said = {
        "pipeline_parallel_size": 1,
        "tensor_parallel_size": 1,
        "runner_type": "generate",
        "enable_sleep_mode": False,
    }
    values = SimpleNamespace(**{**said, **options})
    speculative = SimpleNamespace(method=options["method"]) if "method" in options else None
    return SimpleNamespace(parallel_config=values, model_config=values, speculative_config=speculative)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"runner_type": "pooling"}, "doesn't generate text"),
        ({"enable_sleep_mode": True}, "--enable-sleep-mode"),
        ({"method": "eagle3"}, "method 'eagle3'"),
    ],
)
def test_options_that_reuse_cannot_live_with_are_named(options: dict[str, Any], said: str) -> None:
    assert said in str(unsupported(config(**options)))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UnsupportedModelError("the queries of layer 6 differ."), "the queries of layer 6 differ."),
        (ModelLoadError("/models/private can't be read."), "what it was started with can't be used."),
    ],
    ids=["the model", "its files"],
)
def test_who_asks_a_server_that_reuses_nothing_is_told_why_but_no_paths(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def fail(_model: Any) -> None:
        raise error

    monkeypatch.setattr("cachetune_vllm.start.config_of", fail)
    hello = start_worker(config(), SETTINGS, 1).hello
    assert hello.refusal == str(error)
    assert hello.refusal_told is not None
    assert hello.refusal_told.startswith(f"this server reuses no chunks: {told} The start of its log")


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_tokens_may_be_drafted_from_the_text(method: str) -> None:
    assert unsupported(config(method=method)) is None


def test_the_scheduler_learns_what_auto_is_for_each_selector() -> None:
    calibrated = {"expected_error": 1.0, "frequency": 0.1}

    def config(selector: str, ratio: str) -> Any:
        settled = resolve(selector, ratio)
        return replace(settled, ratio=calibrated.get(settled.selector, settled.ratio))

    engine: Any = SimpleNamespace(admission=SimpleNamespace(config=config))
    ratios = settled_ratios(engine)
    assert ratios == {name: calibrated.get(name, 0.15) for name in selector_names() if name not in ("all", "none")}


@pytest.mark.parametrize(
    ("worker", "seconds"),
    [(os.getpid() + 1, ASKS_FOR), (os.getpid(), 1), (None, 1)],
    ids=["another process", "this process", "not on a CPU"],  # processes that share tests must name them alike
)
def test_the_scheduler_rests_while_a_worker_computes_on_its_cores(worker: int | None, seconds: float) -> None:
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    waits = SpinCondition.__new__(SpinCondition)  # without its sockets
    waits.is_reader, waits.busy_loop_s = True, 1
    rest_between_steps(worker)
    assert waits.busy_loop_s == seconds


@pytest.mark.parametrize(
    ("longest", "ratio", "wanted"),
    [
        (300, 0.15, (300, 300, [300])),
        (4096, 0.15, (1127, 1127, [4096])),
        (32768, 0.05, (2048, 2151, [8192, 32768])),
        (131072, 0.15, (2048, 20173, [8192, 32768, 131072])),
    ],
)
def test_an_engine_is_made_ready_for_what_the_server_reads(
    longest: int, ratio: float, wanted: tuple[int, int, list[int]]
) -> None:
    assert expected(longest, ratio) == wanted


def test_an_engine_is_made_ready_once_with_the_servers_settings() -> None:
    asked: list[tuple[Any, ...]] = []
    started = Started(Hello(None), warm_up=lambda: warm_up(engine_that(asked.append), SETTINGS, 4096))
    assert started.ready() is started.ready() is started.hello
    assert asked == [(512 + 1024, [4096], "probe", 512 + 1024)]


def test_what_cannot_be_made_ready_is_logged_and_stops_no_server(caplog: pytest.LogCaptureFixture) -> None:
    def fail(asked: tuple[Any, ...]) -> None:
        raise RuntimeError(f"no compiler for {asked[2]}")

    with heard("warm_up", caplog):
        warm_up(engine_that(fail), SETTINGS, 4096)
    assert "the first requests with reused chunks will be slower" in caplog.text
    assert "no compiler for probe" in caplog.text


@pytest.mark.parametrize("room", [8192, 100])
def test_where_memory_is_not_enough_for_the_largest_size_the_usual_ones_are_made_ready(
    room: int, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[Any, ...]] = []

    def warm(what: tuple[Any, ...]) -> None:
        asked.append(what)
        if max((what[0], *what[3:])) > room:
            raise torch.OutOfMemoryError(f"no memory for {what}")

    with heard("warm_up", caplog):
        warm_up(engine_that(warm), SETTINGS, 100_000)
    lengths = [8192, 32768, 100_000]
    assert asked == [(2048, lengths, "probe", 25_512), (2048, lengths, "probe")]
    assert "requests that compute more than 2048 tokens" in caplog.text
    assert ("the first requests with reused chunks will be slower" in caplog.text) == (room < 2048)


SETTINGS = ServerSettings.of({"store": "kv", "selector": "probe", "ratio": 0.25})


def engine_that(warms: Callable[[tuple[Any, ...]], None]) -> Any:
    """An engine of which only what is asked of it at the start is there."""
    adapter = SimpleNamespace(heads=ALL_HEADS, device=SimpleNamespace(type="cpu"))
    admission = SimpleNamespace(config=resolve)
    return SimpleNamespace(adapter=adapter, admission=admission, warmup=lambda *asked: warms(asked))


@pytest.mark.parametrize(
    ("dtype", "said"),
    [("float32", "1 chunks in"), ("bfloat16", "start it with --dtype float32"), (None, "nothing is stored")],
)
def test_a_server_says_at_start_what_of_its_store_it_can_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str | None, said: str
) -> None:
    with CacheTune(tiny.llama(), tiny.tokenizer(), tmp_path) as engine:
        namespace = engine.lead_ins.base
        if dtype is not None:
            engine.precompute(["The lighthouse was built in 1871 by three brothers, who had come from the mainland."])
    hello = Hello(replace(namespace, dtype=dtype or "float32"), vocabulary=261, max_positions=2048)
    with heard("recognition", caplog):
        Recognition(ServerSettings.of({"store": str(tmp_path)}), hello, tiny.tokenizer()).close()
    assert said in caplog.text
