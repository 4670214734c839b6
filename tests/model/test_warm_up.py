"""What a warm-up of the kernels' forwards runs and captures, and in which order. That graphs compute the same is for the card (tests/test_gpu.py)."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cachetune_rag.model.cuda import device_forward, graphs
from cachetune_rag.model.cuda.device_forward import DeviceForward
from cachetune_rag.model.plain.buffers import KVBuffers
from cachetune_rag.model.plain.shift import ChunkShift
from cachetune_store import LayerSpec

SPEC = LayerSpec(1, 4, 4)


class Card:
    """Stands for a GPU: it notes which sizes the model ran, which were captured, and how many pieces of graphs were replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.done: list[tuple[str, int]] = []
        self.replayed = 0
        capturing: list[bool] = [False]
        card = self

        class Graph:
            def capture_begin(self, **_: Any) -> None:
                capturing[0] = True

            def capture_end(self) -> None:
                capturing[0] = False

            def replay(self) -> None:
                card.replayed += 1

        def model(ids: torch.Tensor, _places: torch.Tensor, _cache: Any) -> torch.Tensor:
            self.done.append(("captured" if capturing[0] else "run", ids.shape[1]))
            return torch.zeros(1, 5)

        stream = SimpleNamespace(wait_stream=lambda _other: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "Stream", lambda _device: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        self.forward = DeviceForward(
            model, [torch.nn.Identity()], [SPEC], [None], list, lambda _length: [None], torch.device("cpu")
        )
        self.forward.graphs_enabled = True
        monkeypatch.setattr(self.forward, "_padded", True)

    def sizes(self, how: str) -> list[int]:
        return [size for each, size in self.done if each == how]


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
    card = Card(monkeypatch)
    forward = card.forward
    forward.warmup(tokens, largest=largest)
    step = graphs.STEP.tokens
    assert card.sizes("captured") == [*captured, step]
    assert forward.captures == len(captured) + 1
    sizes = sorted([*captured, *run], reverse=True)
    assert card.sizes("run") == [*sizes, step], "nothing is captured before it was run"
    forward.warmup(tokens, largest=largest)
    assert forward.captures == len(captured) + 1


def test_where_no_chunk_is_shifted_a_graph_that_shifts_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server makes graphs for its default selector. Requests with another one, which doesn't shift chunks, would otherwise run without a graph first, which takes memory
    beside the graphs', and then have a graph of each size captured while others wait."""
    card = Card(monkeypatch)
    card.forward.warmup(130, shift=True)
    done, captures = list(card.done), card.forward.captures
    buffers = KVBuffers([SPEC], 400, torch.float32, torch.device("cpu"))

    def ask(tokens: int) -> None:
        card.forward.forward(torch.arange(tokens), torch.arange(400 - tokens, 400), buffers, None)

    for tokens in (100, 64, 192):
        before = card.replayed
        ask(tokens)
        assert card.replayed > before
    assert (card.done, card.forward.captures) == (done, captures)
    for _ in range(3):  # of this size there is no graph: it runs once, and is captured then
        ask(300)
    assert card.done == [*done, ("run", 320), ("captured", 320)]


def test_a_forward_that_shifts_no_chunk_has_none_left_of_the_one_before() -> None:
    """Both have one graph, which reads the same numbers."""
    inputs = graphs.Inputs(graphs.Kind(64, chunks=graphs.padded_chunks(1)), 1, torch.device("cpu"))
    ids, places = torch.arange(8), torch.arange(8)
    buffers = KVBuffers([SPEC], 8, torch.float32, torch.device("cpu"))
    numbers = graphs.shift_numbers(ChunkShift(0.4, [(2, 6)]), places, [0, 0])
    inputs.fill(ids, places, buffers, shift=numbers)
    assert inputs.spans[0, :4].tolist() == [2, 6, 58, 62]  # behind padding
    inputs.fill(ids, places, buffers)
    assert not inputs.spans.any()


def test_where_no_chunk_is_shifted_and_graphs_are_no_longer_used_the_forward_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = Card(monkeypatch)
    card.forward.warmup(130, shift=True)
    monkeypatch.setattr(device_forward, "MAX_TOKENS", 0)
    buffers = KVBuffers([SPEC], 400, torch.float32, torch.device("cpu"))
    replayed, ran = card.replayed, len(card.done)
    card.forward.forward(torch.arange(100), torch.arange(300, 400), buffers, None)
    assert card.done[ran:] == [("run", 100)]
    assert card.replayed == replayed
