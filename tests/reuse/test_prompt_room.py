"""The one piece of memory that prompts are put together in: who has which part of it, and what waits for what before it is used again."""

from __future__ import annotations

import gc
import itertools
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cachetune_rag.model import KVBuffers
from cachetune_rag.reuse import prompt_room
from cachetune_rag.reuse.prompt_room import ALIGNED, KEPT_FREE, NoRoomError, PromptRoom
from cachetune_store import LayerSpec

CPU = torch.device("cpu")
K = 8 * ALIGNED


def test_two_prompts_have_the_two_ends_and_no_third_one_has_a_part() -> None:
    room = PromptRoom(CPU, 10 * K)
    room.give_back(room.take(3 * K))
    assert room.size < 6 * K
    one = room.take(2 * K)
    with pytest.raises(NoRoomError, match="beside the prompts before it"):
        room.take(4 * K)  # it never grows while a prompt has a part
    room.give_back(one)
    one = room.take(2 * K)  # grows for the two that did not fit together
    assert room.size >= 6 * K
    room.give_back(one)
    one, two = room.take(5 * K), room.take(K)
    one.memory.fill_(1)
    two.memory.fill_(2)
    assert int(one.memory.min()) == 1
    with pytest.raises(NoRoomError):
        room.take(ALIGNED)
    room.give_back(one)
    three = room.take(4 * K)
    three.memory.fill_(3)
    assert int(two.memory.max()) == 2
    assert room.parts == 2


def test_it_stays_within_its_bound_and_grows_in_few_steps() -> None:
    room, sizes = PromptRoom(CPU, 1000 * K + 5), set()
    for size in itertools.chain(range(K, 1000 * K, 7 * K), range(1000 * K, K, -50 * K)):
        room.give_back(room.take(size))
        sizes.add(room.size)
    assert len(sizes) <= prompt_room.STEPS
    assert max(sizes) <= 1000 * K + 5
    with pytest.raises(NoRoomError, match=r"its keys and values take 3.91 MiB, and prompts may take 3.906 MiB"):
        room.take(1001 * K)
    assert room.parts == 0
    for most in (100_000, 1023, 512):  # whatever is within what is said to fit does fit
        room = PromptRoom(CPU, most)
        assert room.take(prompt_room.aligned(most)).memory.numel() == prompt_room.aligned(most)


def test_what_an_error_has_left_in_a_cycle_does_not_keep_the_piece_when_it_grows() -> None:
    room = PromptRoom(CPU)
    part = room.take(K)
    cycle: list[Any] = [part.memory]
    cycle.append(cycle)
    room.give_back(part)
    held = weakref.ref(cycle[0])
    del cycle, part
    gc.disable()
    try:
        assert held() is not None
        room.take(2 * K)
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("value_dim", [8, 16, 4])
@pytest.mark.parametrize("answer_rows", [0, 3])
def test_buffers_in_given_memory_are_as_others(value_dim: int, answer_rows: int) -> None:
    for specs in ([LayerSpec(2, 8, value_dim)] * 3, [LayerSpec(2, 8, value_dim), LayerSpec(1, 4, 8)]):
        size = KVBuffers.size_of(specs, 5 + answer_rows, torch.float32)
        memory = torch.zeros(size + 64, dtype=torch.uint8)
        other = KVBuffers(specs, 5, torch.float32, CPU, answer_rows)
        made = KVBuffers(specs, 5, torch.float32, CPU, answer_rows, memory)
        assert made.row_bytes == other.row_bytes
        numbers = itertools.count(1)
        for mine, theirs in zip((*made.key_rows, *made.value_rows), (*other.key_rows, *other.value_rows), strict=True):
            assert mine.shape == theirs.shape
            number = next(numbers)
            mine.fill_(number)
            theirs.fill_(number)
        numbers = itertools.count(1)
        for rows in (*made.key_rows, *made.value_rows):  # nothing lies over anything else
            assert bool((rows == next(numbers)).all())
        assert bool((memory[size:] == 0).all())
        ends = list(itertools.accumulate(KVBuffers.layer_sizes(specs, 5 + answer_rows, torch.float32)))
        assert ends[-1] == size
        for layer, (end, rows) in enumerate(zip(ends, made.key_rows, strict=True)):  # a layer lies in one piece
            assert memory.data_ptr() + ([0, *ends][layer]) <= rows.data_ptr() < memory.data_ptr() + end
            assert made.value_rows[layer].data_ptr() < memory.data_ptr() + end
        made.fill_first(4, other)
        other.fill_first(4, made)
        made.grow(10)  # into memory of their own
        assert bool((made.key_rows[0] == 1).all())


class Stream:
    """Knows which events come before what it is given next: its own, and those that it waited for, with all that came before these."""

    def __init__(self, name: str):
        self.name, self.behind = name, set[str]()

    def wait_event(self, event: Any) -> None:
        self.behind |= event.behind

    def record_event(self) -> Any:
        name = f"{self.name} {len(EVENTS)}"
        self.behind.add(name)
        behind = frozenset(self.behind)
        event = SimpleNamespace(name=name, behind=behind, synchronize=lambda: DONE.update(behind))
        EVENTS.append(event)
        return event


EVENTS: list[Any] = []
DONE: set[str] = set()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A card of so many bytes; `gpu.stream` is the current stream. Memory is the host's."""
    state = SimpleNamespace(stream=Stream("a"), free=100 * K + KEPT_FREE, held=0, emptied=0, full=False)
    make = torch.empty

    def empty(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if state.full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        state.held = size
        return make(size, dtype=dtype)

    def emptied() -> None:
        assert all(event.name in DONE for event in EVENTS), "memory is given away before all that uses it is done"
        state.emptied += 1

    EVENTS.clear()
    DONE.clear()
    monkeypatch.setattr(prompt_room.torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.stream)
    monkeypatch.setattr(torch.cuda, "empty_cache", emptied)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (state.free, 1 << 40))
    return state


def test_on_a_gpu_a_part_waits_for_all_that_was_queued_for_the_parts_before(gpu: Any) -> None:
    computing, placing = Stream("computing"), Stream("placing")
    room = PromptRoom(torch.device("cuda"), 100 * K)
    gpu.stream = computing
    room.give_back(room.take(90 * K))  # as large as it becomes
    first = room.take(30 * K)
    gpu.stream = placing  # the next prompt is begun
    second = room.take(30 * K)
    assert {event.name for event in EVENTS} <= placing.behind
    gpu.stream = computing
    room.give_back(first)
    gpu.stream = placing
    third = room.take(30 * K)
    assert {event.name for event in EVENTS} <= placing.behind
    gpu.stream = computing
    before = len(EVENTS)
    room.give_back(second)
    assert {event.name.split()[0] for event in EVENTS[before:]} == {"computing", "placing"}
    room.give_back(third)
    room.take(80 * K)  # of the memory of both
    assert {event.name for event in EVENTS} <= computing.behind


@pytest.mark.parametrize("lengths", [(10, 10), (10, 7), (7, 10), (3, 10), (10, 3)])
def test_a_prompt_that_does_not_fit_beside_gets_each_layer_of_the_one_before_when_that_is_done(
    gpu: Any, lengths: tuple[int, int]
) -> None:
    computing, placing = Stream("computing"), Stream("placing")
    room, layers = PromptRoom(torch.device("cuda"), 20 * K), 4
    gpu.stream = computing
    whole = room.take(20 * K)  # as large as it becomes
    room.give_back(whole)
    before = room.take(2 * lengths[0] * K, [lengths[0] * K // 2] * layers)
    more = 2 * lengths[1] * K
    beside = before.memory.numel() + more <= 20 * K
    for _ in range(layers):  # not before the last of them: the device may still be given work for it
        assert room.has_room(more) == beside
        room.layer_done(before)
    events = EVENTS[-layers:]
    assert room.has_room(more)
    assert not room.has_room(20 * K + 1)
    gpu.stream = placing
    part = room.take(more, [lengths[1] * K // 2] * layers)
    assert not {event.name for event in events} & placing.behind
    step, size, last = before.memory.numel() // layers, part.memory.numel() // layers, -1
    for layer in range(layers):
        room.await_layer(part, layer)
        start, end = part.start + layer * size, part.start + (layer + 1) * size
        shared = [n for n in range(layers) if before.start + n * step < end and start < before.start + (n + 1) * step]
        last = max(last, *shared) if shared else last
        for number, event in enumerate(events):
            # Of all layers whose memory it has had so far, and of none beyond: it need not wait for them.
            assert (event.name in placing.behind) == (number <= last)
    gpu.stream = computing
    room.give_back(before)
    assert part.start == 0 if not beside else part.end == room.size
    room.give_back(part)
    assert room.parts == 0


def test_it_grows_for_two_although_prompts_follow_each_other_without_a_rest() -> None:
    room = PromptRoom(CPU, 16 * K)
    at_hand = room.take(4 * K, [K] * 4)
    for _ in range(6):
        for _ in range(4):
            room.layer_done(at_hand)
        following = room.take(4 * K, [K] * 4) if room.has_room(4 * K) else None
        room.give_back(at_hand)
        at_hand = following or room.take(4 * K, [K] * 4)
    assert room.size >= 8 * K


def test_without_its_layers_a_part_is_not_given_to_the_next_prompt_before_it_is_given_back() -> None:
    room = PromptRoom(CPU, 2 * K)
    part = room.take(2 * K)
    assert not room.has_room(K)
    with pytest.raises(NoRoomError, match="beside the prompts before it"):
        room.take(K)
    room.give_back(part)
    assert room.has_room(2 * K)


def test_on_a_gpu_it_grows_only_if_memory_stays_free_and_when_nothing_uses_it_any_more(gpu: Any) -> None:
    room = PromptRoom(torch.device("cuda"), 100 * K)
    one = room.take(10 * K)
    with pytest.raises(NoRoomError):
        room.take(60 * K)
    room.give_back(one)
    gpu.free = 30 * K + KEPT_FREE
    one = room.take(28 * K)  # there is no memory for two, so for this one alone
    assert room.size <= 30 * K
    room.give_back(one)
    gpu.free = 29 * K + KEPT_FREE
    with pytest.raises(NoRoomError, match="no room for now"):
        room.take(40 * K)
    assert room.parts == room.size == 0
    gpu.full = True
    with pytest.raises(NoRoomError, match="no room for now"):
        room.take(20 * K)
    gpu.full = False
    room.take(20 * K)
    assert gpu.emptied > 0
