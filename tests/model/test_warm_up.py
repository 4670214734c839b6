"""What a warm-up of the kernels' forwards runs and captures, and in which order. That graphs compute the same is for the card (tests/test_gpu.py)."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cachetune_rag.model.cuda import graphs
from cachetune_rag.model.cuda.device_forward import DeviceForward
from cachetune_store import LayerSpec


@pytest.mark.parametrize(
    ("tokens", "largest", "captured", "run"),
    [
        (130, 0, [192, 128, 64], []),
        (130, 100, [192, 128, 64], []),
        (130, 400, [448, 192, 128, 64], [384, 320, 256]),
        (64, 20_000, [graphs.MAX_TOKENS, 64], graphs.buckets(graphs.MAX_TOKENS)[-2:0:-1]),
    ],
)
def test_the_largest_graph_is_captured_first_and_sizes_that_are_not_captured_are_run(
    monkeypatch: pytest.MonkeyPatch, tokens: int, largest: int, captured: list[int], run: list[int]
) -> None:
    """All graphs share the memory of the largest: captured one by one as prompts get longer, each would take memory of its own. And a forward without a graph takes memory
    beside them: where the kernels of a size are compiled, its first forward is captured."""
    done: list[tuple[str, int]] = []
    capturing: list[bool] = [False]

    class Graph:
        def capture_begin(self, **_: Any) -> None:
            capturing[0] = True

        def capture_end(self) -> None:
            capturing[0] = False

    def model(ids: torch.Tensor, _places: torch.Tensor, _cache: Any) -> torch.Tensor:
        done.append(("captured" if capturing[0] else "run", ids.shape[1]))
        return torch.zeros(1, 5)

    stream = SimpleNamespace(wait_stream=lambda _other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    forward = DeviceForward(
        model, [torch.nn.Identity()], [LayerSpec(1, 4, 4)], [None], list, lambda _length: [None], torch.device("cpu")
    )
    forward.graphs_enabled = True
    forward.warmup(tokens, largest=largest)
    step = graphs.STEP.tokens
    assert [size for how, size in done if how == "captured"] == [*captured, step]
    assert forward.captures == len(captured) + 1
    sizes = sorted([*captured, *run], reverse=True)
    assert [size for how, size in done if how == "run"] == [*sizes, step], "nothing is captured before it was run"
    forward.warmup(tokens, largest=largest)
    assert forward.captures == len(captured) + 1
