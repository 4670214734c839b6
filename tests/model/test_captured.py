"""Which forwards have a graph, and what happens where a capture fails. That graphs compute the same is for the card (tests/test_gpu.py)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cachetune_rag.model.cuda import captured
from cachetune_rag.model.cuda.captured import CapturedGraphs
from cachetune_rag.model.cuda.graphs import Inputs, Kind
from cachetune_rag.model.cuda.kernel_call import KernelCall

CPU = torch.device("cpu")
DISTURBED = RuntimeError("CUDA error: operation failed due to a previous error during capture")
ON_THE_HOST = RuntimeError("CUDA error: operation not permitted when stream is capturing")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CapturedGraphs:
    """Graphs of a device on which a capture does nothing."""

    class Nothing:
        def __getattr__(self, _name: str) -> Callable[..., None]:
            return lambda *_args, **_kwargs: None

    for name in ("CUDAGraph", "Stream", "current_stream", "graph_pool_handle", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: Nothing())
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: nullcontext())
    return CapturedGraphs(CPU, True, lambda _exchange: nullcontext())


def ask(graphs: CapturedGraphs, tokens: int, error: Exception | None = None) -> str:
    """How a forward of a size is run; a capture fails by `error`."""
    kind, how = Kind(tokens), "replayed"

    def run(_before: Callable[[int], None]) -> tuple[torch.Tensor, KernelCall]:
        if error is not None:
            raise error
        call: Any = SimpleNamespace(probing=None)
        return torch.zeros(1), call

    graph = graphs.find(kind)
    if graph is None and graphs.wants(kind):
        graph, how = graphs.capture(kind, Inputs(kind, 1, CPU), run), "captured"
    graphs.ran(kind)
    return "run" if graph is None else how


def test_the_first_forward_of_a_size_is_run_the_second_captured_and_others_replayed(graphs: CapturedGraphs) -> None:
    assert [ask(graphs, 64) for _ in range(4)] == ["run", "captured", "replayed", "replayed"]
    graphs.enabled = False
    assert [ask(graphs, 64), ask(graphs, 128)] == ["run", "run"]
    graphs.enabled = True
    assert [ask(graphs, 64), ask(graphs, 128)] == ["replayed", "captured"]
    assert graphs.captures == 2
    graphs.drop()
    assert [ask(graphs, 64) for _ in range(3)] == ["run", "captured", "replayed"]


def test_a_size_for_which_there_is_no_memory_has_no_graph_and_others_have(
    graphs: CapturedGraphs, caplog: pytest.LogCaptureFixture
) -> None:
    full = RuntimeError("capture failed")
    full.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    ask(graphs, 4096)
    assert [ask(graphs, 4096, full), ask(graphs, 4096), ask(graphs, 4096)] == ["run", "run", "run"]
    assert [ask(graphs, 64) for _ in range(3)] == ["run", "captured", "replayed"]
    assert [each.getMessage() for each in caplog.records] == [
        "no memory for a CUDA graph of 4096 tokens: requests of this size run as they are"
    ]


def test_a_capture_that_another_thread_ends_is_tried_again_but_not_for_ever(
    graphs: CapturedGraphs, caplog: pytest.LogCaptureFixture
) -> None:
    ask(graphs, 64)
    ask(graphs, 128)
    assert [ask(graphs, 64, DISTURBED) for _ in range(4)] == ["run"] * 4
    assert [ask(graphs, 64), ask(graphs, 64)] == ["captured", "replayed"]
    assert [ask(graphs, 128, DISTURBED) for _ in range(4)] == ["run"] * 4, "they are counted in a row"
    assert graphs.enabled
    assert ask(graphs, 128, DISTURBED) == "run"
    assert not graphs.enabled
    assert {each.levelno for each in caplog.records} == {logging.WARNING}
    assert "tries again" in caplog.records[-2].getMessage()
    assert "no CUDA graphs for this model" in caplog.records[-1].getMessage()


def test_a_model_that_cant_be_captured_has_no_graphs_any_more(graphs: CapturedGraphs) -> None:
    assert [ask(graphs, 64), ask(graphs, 64), ask(graphs, 128)] == ["run", "captured", "run"]
    assert ask(graphs, 128, ON_THE_HOST) == "run"
    assert not graphs.enabled
    assert Kind(64) not in graphs
    assert [ask(graphs, 64), ask(graphs, 128)] == ["run", "run"]


def test_of_too_many_graphs_the_one_that_was_not_used_for_longest_goes(
    graphs: CapturedGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured, "MAX_GRAPHS", 2)
    for tokens in (64, 128, 192):
        ask(graphs, tokens)
    assert [ask(graphs, 64), ask(graphs, 128), ask(graphs, 64), ask(graphs, 192)] == [
        "captured", "captured", "replayed", "captured",
    ]  # fmt: skip
    assert [ask(graphs, 64), ask(graphs, 192), ask(graphs, 128)] == ["replayed", "replayed", "captured"]
