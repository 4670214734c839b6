"""How fast a tier has read lately; the clock is the test's."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_samples import sample

from cachetune_store import ChunkStore, read_speed
from cachetune_store.read_speed import ENOUGH, KEPT, LONGEST, PIECE, REMEMBERED, ReadSpeed


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def read(speed: ReadSpeed, clock: Clock, seconds: float, count: int = PIECE) -> None:
    number = speed.begin()
    clock.now += seconds
    speed.end(number, count)


def test_the_median_of_the_latest_pieces_once_there_are_enough() -> None:
    speed = ReadSpeed(clock := Clock())
    for _ in range(ENOUGH):
        assert speed.lately is None
        clock.now += 5  # nothing is read meanwhile
        read(speed, clock, 0.5)
    assert speed.lately == pytest.approx(2 * PIECE)
    read(speed, clock, 60)  # one that waited for something
    assert speed.lately == pytest.approx(2 * PIECE)
    for _ in range(KEPT):
        read(speed, clock, 2)
    assert speed.lately == pytest.approx(PIECE / 2)
    clock.now += REMEMBERED + 1
    assert speed.lately is None


def test_a_piece_is_not_put_together_of_reads_that_are_long_forgotten() -> None:
    speed = ReadSpeed(clock := Clock())
    read(speed, clock, 50, PIECE - 1)
    clock.now += REMEMBERED + 1
    read(speed, clock, 0.5, PIECE // 2)  # no whole piece by itself
    for _ in range(ENOUGH):
        assert speed.lately is None
        read(speed, clock, 1)
    assert speed.lately == pytest.approx(PIECE)


def test_reads_side_by_side_share_their_time_and_small_ones_are_taken_together() -> None:
    speed = ReadSpeed(clock := Clock())
    for _ in range(2 * ENOUGH):
        one = speed.begin()
        clock.now += 0.1
        other = speed.begin()
        clock.now += 0.2
        speed.end(one, PIECE // 4)
        clock.now += 0.2
        speed.end(other, PIECE // 4)
        clock.now += 7
    assert speed.lately == pytest.approx(PIECE)


def test_what_failed_takes_time_and_gives_nothing() -> None:
    speed = ReadSpeed(clock := Clock())
    for _ in range(ENOUGH):
        read(speed, clock, 1, 0)
        read(speed, clock, 1)
    assert speed.lately == pytest.approx(PIECE / 2)


def test_a_read_that_a_disk_never_ends_does_not_make_it_slow_for_ever() -> None:
    speed = ReadSpeed(clock := Clock())
    hanging = speed.begin()
    clock.now += LONGEST
    for _ in range(ENOUGH):
        clock.now += 30  # nothing is read meanwhile
        read(speed, clock, 0.5)
    clock.now += LONGEST
    read(speed, clock, 0.5)
    assert speed.lately == pytest.approx(2 * PIECE)
    speed.end(hanging, 100 * PIECE)  # it says nothing of the speed
    read(speed, clock, 0.5)
    assert speed.lately == pytest.approx(2 * PIECE)


def test_a_store_times_rows_from_disk_and_not_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_speed, "PIECE", 1)  # every read is a piece
    one = sample(layers=3)
    with ChunkStore(tmp_path) as store:
        one.put(store)
        with store.open(one.key) as reader:  # type: ignore[union-attr]
            assert reader.in_memory
            assert one.matches(reader)
        assert store.read_speed("disk") is None
    with ChunkStore(tmp_path) as store, store.open(one.key) as reader:  # type: ignore[union-attr]
        for _ in range(3):
            for layer in range(2):
                reader.read(layer, 150)
            assert store.read_speed("disk") is None  # nothing is read twice
        reader.read(2, 150)
        assert store.read_speed("disk") > 0  # type: ignore[operator]
        assert (store.read_speed("host"), store.read_speed("remote")) == (None, None)
