"""What a new replica is told to read into memory. No cluster is started."""

from __future__ import annotations

from cachetune_ray.memories import Memories


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_new_replica_gets_what_a_lost_one_had_and_then_what_the_others_use() -> None:
    clock = Clock()
    memories = Memories(10, clock)
    assert memories.wanted("first") == []
    assert memories.tell("a", ["1", "2", "3"])
    assert memories.tell("b", ["4", "1"])
    clock.now = 8
    assert memories.tell("c", ["7"])
    assert memories.tell("a", None), "it has the same as before"
    assert memories.wanted("new") == ["1", "4", "7", "2", "3"], "nobody is lost: what each used last comes first"
    clock.now = 12
    assert memories.wanted("new") == ["4", "1", "7", "2", "3"], "b is lost"
    assert memories.wanted("newer") == ["1", "7", "2", "3"], "which another new one doesn't take over again"


def test_a_replica_tells_its_chunks_where_they_are_not_known() -> None:
    clock = Clock()
    memories = Memories(10, clock)
    assert not memories.tell("a", None), "of a replica that is known no more"
    assert memories.tell("a", ["1"])
    assert memories.wanted("a") == [], "its own"
    clock.now = 100
    for number in range(100):
        memories.tell(f"{number}", [str(number)])
    clock.now = 200
    gone = [memories.wanted("new") for _ in range(70)]
    assert gone.count([]) == 6, "the latest 64 are remembered"
