"""A forward of a divided model as CUDA graphs: what workers exchange is not captured, and is done in every replay, in the same order."""

from __future__ import annotations

import gc
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cachetune_rag.model.cuda.graphs import ExchangeMemory, Graph, Recorder
from cachetune_rag.model.heads import PeerError
from cachetune_vllm import divided_heads
from cachetune_vllm.divided_heads import DividedHeads


class Replayed(TorchDispatchMode):
    """In place of a CUDA graph: notes what is computed, and computes it again in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, ...]] = []

    def capture_begin(self, **_: Any) -> None:
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self._calls:
            made = func(*args, **kwargs)
            if isinstance(out, Tensor) and made.data_ptr() != out.data_ptr():
                out.copy_(made)


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> tuple[DividedHeads, list[str]]:
    """Those of the first of two workers, of which the other one has ten times the numbers."""
    done: list[str] = []

    def all_reduce(numbers: Tensor) -> Tensor:
        done.append(f"sum of {tuple(numbers.shape)}")
        return 11 * numbers

    def all_gather(numbers: Tensor, dim: int) -> Tensor:
        done.append(f"parts of {tuple(numbers.shape)}")
        return torch.cat((numbers, 10 * numbers), dim)

    monkeypatch.setattr(divided_heads, "_cpu_group", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replayed)
    communicator = SimpleNamespace(all_reduce=all_reduce, all_gather=all_gather)
    group = SimpleNamespace(world_size=2, rank_in_group=0, ranks=[0, 1], device_communicator=communicator)
    return DividedHeads(group, 2), done


def test_every_exchange_of_a_forward_is_done_in_a_replay_and_none_in_the_capture(
    heads: tuple[DividedHeads, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, done = heads
    spent: list[int] = []
    monkeypatch.setattr(mine.turns, "spend", spent.append)

    def forward(rows: Tensor, before: Any) -> Tensor:
        first = mine.added_up(rows * 2)
        before(0)
        second = mine.added_up(first[:, :3] + 1)
        before(1)
        # Of the first one, too, after the second has used the same memory.
        return mine.joined(second - mine.mean(first)[:, :3], -1)

    def noted(layer: int) -> None:
        done.append(f"layer {layer}")

    given = torch.zeros(4, 5)
    recorder = Recorder(None, ExchangeMemory())
    with mine.recorded(recorder.exchange):
        recorder.begin()
        out = forward(given, recorder.cut)
        recorder.end()
    assert (done, spent) == ([], [])
    graph = Graph(SimpleNamespace(), recorder.pieces, out)  # type: ignore[arg-type]
    for seed in range(3):
        rows = torch.rand(4, 5, generator=torch.Generator().manual_seed(seed))
        given.copy_(rows)
        done.clear()
        found, in_replay = graph.replay(noted), list(done)
        done.clear()
        assert torch.equal(found, forward(rows, noted))
        assert in_replay == done
        assert len(done) == 6
    assert spent == [4] * 12  # two of each forward: a turn may be given back at the same places


def test_a_replay_makes_no_detour_through_what_compiled_code_calls(
    heads: tuple[DividedHeads, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes the host as long as the rest of an exchange."""
    mine, done = heads
    given, recorder = torch.zeros(4, 6), Recorder(None, ExchangeMemory())
    with mine.recorded(recorder.exchange):
        recorder.begin()
        out = mine.joined(mine.total(mine.added_up(given)), -1)
        recorder.end()
    for name in ("added_up", "total", "joined"):
        monkeypatch.delattr(DividedHeads, name)
    Graph(SimpleNamespace(), recorder.pieces, out).replay(lambda _layer: None)  # type: ignore[arg-type]
    assert done == ["sum of (4, 6)", "sum of (4, 6)", "parts of (4, 6)"]


def test_larger_exchanges_get_memory_of_their_own(heads: tuple[DividedHeads, list[str]]) -> None:
    """Graphs that were captured before go on with theirs."""
    mine, memory, graphs = heads[0], ExchangeMemory(), []
    for count in (2, 3, 50, 4):
        given, recorder = torch.zeros(count), Recorder(None, memory)
        with mine.recorded(recorder.exchange):
            recorder.begin()
            out = mine.total(mine.total(given))
            recorder.end()
        graphs.append((given, Graph(SimpleNamespace(), recorder.pieces, out)))  # type: ignore[arg-type]
    for given, graph in graphs:
        given.copy_(torch.arange(len(given)))
        assert torch.equal(graph.replay(lambda _layer: None), 121 * torch.arange(len(given)).float())


def test_a_worker_hears_what_kind_of_error_another_one_has(
    heads: tuple[DividedHeads, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that all of them give a request the same reason. One that can't go on decides for those that could try again."""
    divided, _ = heads
    damage, full = (True, "OSError", "a chunk is damaged"), (False, "NoRoomError", "there is no room.")
    theirs: list[Any] = [(damage, None), (full, None)]
    monkeypatch.setattr(divided_heads, "gathered", lambda value, group: [value, *theirs])

    def damaged() -> None:
        raise OSError("a chunk is damaged")

    for work in (lambda: None, damaged):
        with pytest.raises(PeerError, match=r"another worker failed: NoRoomError: there is no room\.") as caught:
            divided.together(work, (OSError,))
        assert (caught.value.kind, caught.value.again) == ("NoRoomError", False)
    theirs.pop()
    with pytest.raises(PeerError, match="OSError: a chunk is damaged") as caught:
        divided.together(lambda: None, (OSError,))
    assert caught.value.again
    with pytest.raises(OSError, match=r"^a chunk is damaged"):
        divided.together(damaged, (OSError,))


@pytest.mark.parametrize("where", ["beside its turn", "in its turn"])
def test_a_prompt_that_failed_on_all_workers_is_not_kept(
    where: str, heads: tuple[DividedHeads, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether an error came to all of them is remembered with the error, and an error refers to the memory of its prompt."""
    divided, _ = heads
    monkeypatch.setattr(divided_heads, "gathered", lambda value, group: [value, value])
    kept: list[weakref.ref[torch.Tensor]] = []
    known: list[bool] = []

    def fail() -> None:
        raise OSError("the disk is gone")

    def prompt() -> None:
        buffers = torch.zeros(1)
        kept.append(weakref.ref(buffers))
        if where == "beside its turn":
            divided.together(fail)
        lender = threading.Thread(target=divided.turns.lend, args=(None,))
        lender.start()
        try:
            with divided.turns.taken():
                fail()
        finally:
            lender.join()

    gc.disable()
    try:
        for _ in range(2):
            try:
                prompt()
            except OSError as error:
                known.append(divided.raised_on_all(error))
        assert known == [True, True]
        assert [buffers() for buffers in kept] == [None, None]
        assert not divided.raised_on_all(OSError("the disk is gone"))
    finally:
        gc.enable()
