"""Sketches of texts, and which replica a request is sent to. Needs no Ray."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache

import numpy as np
import pytest

from cachetune_rag.errors import ConfigError
from cachetune_ray.routing import ChunkRouting
from cachetune_ray.sketch import RATE, WINDOW, Sketch, samples_of


def text(seed: int, characters: int = 2000) -> str:
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz     éß漢😀", k=characters))


@cache
def sketch(*seeds: int) -> bytes:
    return Sketch.of(samples_of(map(text, seeds))).to_bytes()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_text_has_the_same_hashes_wherever_it_stands() -> None:
    alone = samples_of([text(1)])
    assert 0.5 < len(alone) / (2000 / RATE) < 1.5
    inside = samples_of(["system\n\n" + text(2) + "\n\n" + text(1) + "\n\nWhat is it?"])
    assert set(alone.tolist()) <= set(inside.tolist())
    assert samples_of(["x" * (WINDOW - 1)]).size == 0
    assert samples_of([]).size == 0
    assert samples_of([text(1), text(1)]).tolist() == alone.tolist()


def test_hashes_are_what_they_were() -> None:
    # Routers and replicas of different releases share sketches.
    assert samples_of(["".join(map(chr, range(97, 97 + 500)))]).tolist()[:2] == [
        500436602018017024,
        2953543649307092512,
    ]


def test_a_sketch_knows_what_it_is_of_and_little_else() -> None:
    made = Sketch.from_bytes(sketch(*range(40)))
    assert made.known(samples_of(map(text, range(40)))).all()
    others = samples_of(map(text, range(100, 300)))
    assert made.known(others).mean() < 0.01
    assert len(sketch(*range(40))) <= 8 << 10, "3 KB for 2,500 hashes, rounded up"
    assert not Sketch.of(samples_of([])).known(others).any()


def test_a_request_goes_where_most_of_its_chunks_are() -> None:
    routing = ChunkRouting()
    routing.published("a", 1, sketch(1, 2, 3))
    routing.published("b", 1, sketch(3, 4, 5))
    loads = {"a": 0, "b": 0, "c": 0}
    assert routing.rank(samples_of([text(1), text(3)]), loads)[:2] == ["a", "b"]
    assert routing.rank(samples_of([text(4), text(5), text(1)]), loads)[:2] == ["b", "a"]
    routing.published("a", 2, sketch(4, 5, 1))
    assert routing.rank(samples_of([text(4), text(5), text(1)]), loads)[0] == "a"
    routing.published("b", 1, b"the same version is not read again")
    assert routing.rank(samples_of([text(3)]), loads)[0] == "b"


def test_a_sketch_takes_the_place_of_what_was_sent_before_the_last_one() -> None:
    clock = Clock()
    routing = ChunkRouting(settle=1000, clock=clock)
    clock.now = 1
    routing.sent("a", samples_of([text(1)]))
    clock.now = 1.5
    routing.published("a", 1, sketch())
    assert routing.found("a", samples_of([text(1)])) > 0, "it may have been made before the request came"
    clock.now = 2
    routing.sent("a", samples_of([text(2)]))
    routing.published("a", 2, sketch(3))
    assert routing.found("a", samples_of([text(1)])) == 0, "evicted"
    assert routing.found("a", samples_of([text(2)])) > 0
    assert routing.found("a", samples_of([text(3)])) > 0


def test_a_replica_that_is_asked_too_much_comes_last() -> None:
    routing = ChunkRouting(spread=1.5)
    routing.published("a", 1, sketch(1))
    wanted = samples_of([text(1)])
    # The bound is 1.5 * (load of all + 1) / 3, rounded up.
    assert routing.rank(wanted, {"a": 1, "b": 0, "c": 0})[-1] == "a"
    assert routing.rank(wanted, {"a": 2, "b": 2, "c": 2})[0] == "a"
    assert routing.rank(wanted, {"a": 4, "b": 2, "c": 1}) == ["c", "b", "a"]
    assert routing.rank(wanted, {}) == []


def test_what_was_sent_counts_until_a_sketch_had_time_to_come() -> None:
    clock = Clock()
    routing = ChunkRouting(settle=10, clock=clock)
    loads = {"a": 0, "b": 0, "c": 0}
    first = routing.rank(samples_of([text(1)]), loads)[0]
    routing.sent(first, samples_of([text(1)]))
    clock.now = 9.0
    assert routing.rank(samples_of([text(1), text(2)]), loads)[0] == first
    assert routing.rank(samples_of([text(3)]), loads)[0] != first, "what nobody has goes to who was asked least"
    clock.now = 11.0
    assert routing.found(first, samples_of([text(1)])) == 0
    routing.sent(first, samples_of([text(1)]))
    routing.keep(["b", "c", first])
    assert routing.found(first, samples_of([text(1)])) > 0
    routing.keep([name for name in loads if name != first])
    assert routing.found(first, samples_of([text(1)])) == 0


def test_requests_of_a_skewed_corpus_find_more_than_in_turns_and_no_replica_is_asked_much_more() -> None:
    """Three replicas, each with memory for a quarter of the chunks; four requests are answered at a time.

    A request shows four of the five chunks of a subject, and subjects are asked for by Zipf's law.
    """
    subjects, each, memory = 24, 5, 30
    chunks = [samples_of([text(seed, 600)]) for seed in range(subjects * each)]
    weights = [1 / (rank + 1) for rank in range(subjects)]

    def hits(routed: bool) -> tuple[float, Counter[str]]:
        draw, clock = random.Random(7), Clock()
        routing = ChunkRouting(settle=5, clock=clock)
        held: dict[str, list[int]] = {"a": [], "b": [], "c": []}
        answering: list[str] = []
        asked: Counter[str] = Counter()
        found = total = 0
        for number in range(400):
            clock.now += 0.1
            subject = draw.choices(range(subjects), weights)[0]
            wanted = draw.sample(range(subject * each, subject * each + each), 4)
            samples = np.unique(np.concatenate([chunks[i] for i in wanted]))
            loads = {name: answering.count(name) for name in held}
            chosen = routing.rank(samples, loads)[0] if routed else "abc"[number % 3]
            routing.sent(chosen, samples)
            asked[chosen] += 1
            answering = [*answering, chosen][-4:]
            found += sum(i in held[chosen] for i in wanted)
            total += len(wanted)
            held[chosen] = [i for i in held[chosen] if i not in wanted][-(memory - 4) :] + wanted
            if number % 20 == 0:
                for name, keys in held.items():
                    there = np.concatenate([chunks[i] for i in keys]) if keys else samples_of([])
                    routing.published(name, number, Sketch.of(np.unique(there)).to_bytes())
        return found / total, asked

    (routed, asked), (in_turns, _) = hits(True), hits(False)
    assert routed > 1.3 * in_turns
    assert max(asked.values()) < 1.5 * min(asked.values())


@pytest.mark.parametrize(("name", "value"), [("spread", 1), ("spread", "x"), ("settle", -1), ("settle", None)])
def test_arguments_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name} is"):
        ChunkRouting(**{name: value})  # type: ignore[arg-type]
