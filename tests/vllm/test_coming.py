"""The prompt that waits next is begun while one is computed, which must not suffer for it. Without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cachetune_rag.model.heads import ALL_HEADS
from cachetune_rag.reuse.prompt_room import ALIGNED, PromptRoom
from cachetune_rag.text.recognising.id_spans import IdSpan, prompt_of_ids
from cachetune_vllm.coming import Coming, GivenUpError, Job, Turn
from cachetune_vllm.messages import Load, Missed

TOKENS = 64


class Begun:
    """Stands for a prompt that was begun."""

    def __init__(self, error: Exception | None = None):
        self.error, self.steps, self.closed = error, 0, False

    def go_on(self) -> None:
        self.steps += 1
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.closed = True


class Engine:
    """Stands for an engine: `begins` says what each `begin` gives or raises."""

    def __init__(self, *begins: Begun | Exception | None):
        self.begins, self.asked = list(begins), 0
        self.fetched: list[Any] = []
        self.read = True  # whether what was fetched is there
        self.admission = SimpleNamespace(config=lambda *asked: None)
        self.assembler = SimpleNamespace(
            memory=SimpleNamespace(bytes_for=lambda ids, answer_tokens: len(ids) * ALIGNED)
        )
        self.executor = self

    def begin(self, request: Any, memory: Any) -> Begun | None:
        self.asked += 1
        given = self.begins.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    def prefetch(self, chunk_ids: Any, config: Any) -> Any:
        self.fetched.append(list(chunk_ids()))
        return SimpleNamespace(wait=lambda seconds: self.read)


def job(name: str, tenant: str = "") -> Job:
    prompt = prompt_of_ids(range(TOKENS), [IdSpan(16, 48, name)])
    return Job(Load(name, prompt, "frequency", 0.15, tenant, (1, 2, 3, 4), 0, TOKENS - 1, 0), None)


def coming_of(engine: Engine, over: frozenset[str] = frozenset(), room: PromptRoom | None = None) -> Coming:
    def check(request_id: str) -> None:
        if request_id in over:
            raise GivenUpError(request_id)

    pages: Any = SimpleNamespace(block_size=16)
    made: Any = engine
    return Coming(lambda tenant: made, pages, ALL_HEADS, check, room or PromptRoom(torch.device("cpu")))


def at_hand(coming: Coming, *behind: Job | Missed) -> Turn:
    """The first prompt's turn, with others behind it."""
    coming.put(job("first"))
    for other in behind:
        coming.put(other)
    first = coming.next()
    assert isinstance(first, Job)
    return coming.turn_of(first)


def test_the_next_prompt_is_begun_once_and_gets_what_was_begun() -> None:
    begun, second = Begun(), job("second")
    coming = coming_of(engine := Engine(begun))
    turn = at_hand(coming, second)
    for _ in range(3):
        coming.begin_next(turn)
    assert (engine.asked, begun.steps) == (1, 2)
    assert coming.next() is second
    theirs = coming.turn_of(second)
    assert theirs.begun is begun
    theirs.close()
    assert begun.closed


def test_one_that_comes_late_is_begun_as_well() -> None:
    coming = coming_of(engine := Engine(Begun()))
    turn = at_hand(coming)
    coming.begin_next(turn)
    coming.put(job("late"))
    coming.begin_next(turn)
    assert engine.asked == 1


@pytest.mark.parametrize("given", [None, RuntimeError("CUDA error 2"), MemoryError()])
def test_what_fails_for_the_next_prompt_is_left_to_its_turn(given: Exception | None) -> None:
    second = job("second")
    coming = coming_of(engine := Engine(given))
    turn = at_hand(coming, second)
    for _ in range(3):
        coming.begin_next(turn)
    assert engine.asked == 1
    # Where it can't be begun because its chunks are on disk, they are read meanwhile.
    assert engine.fetched == ([] if given else [list(second.load.prompt.chunk_ids)])
    assert coming.next() is second
    assert coming.turn_of(second).begun is None


def test_no_more_is_read_while_the_disk_has_not_given_what_an_earlier_prompt_needs() -> None:
    jobs = [job(f"j{number}") for number in range(4)]
    coming = coming_of(engine := Engine(None, None, None))
    turn = at_hand(coming, *jobs)
    for there, fetched in ((False, 1), (False, 1), (True, 2)):
        engine.read = there
        coming.begin_next(turn)
        assert len(engine.fetched) == fetched
        turn = coming.turn_of(coming.next())  # type: ignore[arg-type]
        turn.close()


def test_what_fails_later_is_closed_and_begins_anew_at_its_turn() -> None:
    begun, second = Begun(RuntimeError("no memory")), job("second")
    coming = coming_of(Engine(begun))
    turn = at_hand(coming, second)
    for _ in range(3):
        coming.begin_next(turn)
    assert (begun.steps, begun.closed) == (1, True)
    assert coming.next() is second
    assert coming.turn_of(second).begun is None


def test_not_begun_where_an_engine_would_be_made_or_nobody_waits_for_it_any_more() -> None:
    for coming, second in (
        (coming_of(engine := Engine()), job("second", tenant="other")),
        (coming_of(engine, over=frozenset({"second"})), job("second")),
    ):
        coming.begin_next(at_hand(coming, second))
        assert engine.asked == 0
        assert coming.next() is second


@pytest.mark.parametrize("fits", [False, True])
def test_not_begun_where_memory_has_no_room_for_both(fits: bool) -> None:
    room = PromptRoom(torch.device("cpu"), (2 * TOKENS - (not fits)) * ALIGNED)
    room.give_back(room.take((2 * TOKENS - (not fits)) * ALIGNED))
    coming = coming_of(engine := Engine(Begun()), room=room)
    turn = at_hand(coming, job("second"))
    room.take(TOKENS * ALIGNED)  # the one at hand
    coming.begin_next(turn)
    assert engine.asked == fits


def test_the_order_stays_and_closing_lets_go() -> None:
    begun = Begun()
    coming = coming_of(Engine(begun))
    missed = Missed("third", prompt_of_ids(range(4), []), (), "")
    second = job("second")
    turn = at_hand(coming, missed, second)
    coming.begin_next(turn)
    assert coming.next() is missed
    coming.begin_next(turn)
    coming.close()
    assert begun.closed
    assert coming.next() is second
