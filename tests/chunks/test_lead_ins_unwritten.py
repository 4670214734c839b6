"""Lead-ins that were chosen and can't be written: nothing piles up, and requests don't try all the time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_lead_ins import BASE, prose

from cachetune_rag.chunks import lead_ins as lead_ins_module
from cachetune_rag.chunks.lead_ins import MOST_TOKENS, LeadIns
from cachetune_store import ChunkStore, StoreFullError


class FullStore(ChunkStore):
    """One whose disk is full as long as `full` is set."""

    full, tried = True, 0

    def settle_note(self, *arguments: Any, **named: Any) -> None:
        self.tried += 1
        if self.full:
            raise StoreFullError("no room")
        super().settle_note(*arguments, **named)


def ids(count: int, seed: int) -> list[int]:
    return [ord(c) for c in prose(count, seed)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FullStore]:
    with FullStore(tmp_path) as opened:
        yield opened


@pytest.fixture
def lead_ins(store: FullStore) -> LeadIns:
    return LeadIns(store, BASE, choose=True, vocabulary=300, limit=None)


def held(lead_ins: LeadIns) -> int:
    return sum(map(len, lead_ins.waiting_texts))


def test_a_choice_that_cant_be_written_holds_no_texts(
    lead_ins: LeadIns, store: FullStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    choose = lead_ins_module.choose_lead_ins
    monkeypatch.setattr(lead_ins_module, "choose_lead_ins", lambda *a: chosen.append(len(a[0])) or choose(*a))
    for i in range(30):
        with pytest.raises(StoreFullError if i == 0 else lead_ins_module.StoreError, match="no room"):
            lead_ins.choose_from([ids(600, 3 * i + k) for k in range(3)], indexing=False)
        assert held(lead_ins) == 0
    assert (chosen, store.tried) == ([3], 1)


def test_it_is_tried_again_by_requests_after_a_while_and_by_precompute_at_once(
    lead_ins: LeadIns, store: FullStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreFullError):
        lead_ins.choose_from([ids(1500, 1)], indexing=False)
    wanted = lead_ins.choice_to_write
    with pytest.raises(StoreFullError):
        lead_ins.choose_from([ids(1500, 2)], indexing=True)
    monkeypatch.setattr(lead_ins_module, "RETRY_SECONDS", 0.0)
    with pytest.raises(StoreFullError):
        lead_ins.choose_from([], indexing=True)
    with pytest.raises(StoreFullError):
        lead_ins.choose_from([ids(1500, 3)], indexing=False)
    assert store.tried == 4
    store.full = False
    assert lead_ins.choose_from([ids(1500, 4)], indexing=False) == lead_ins.namespace == wanted


def test_texts_that_are_too_few_are_bounded(lead_ins: LeadIns) -> None:
    lead_ins.choose_from([[], []], indexing=False)
    assert lead_ins.waiting_texts == []
    for i in range(5000):
        lead_ins.choose_from([[i % 7 + 5]], indexing=False)
    assert len(lead_ins.waiting_texts) == 7
    with pytest.raises(StoreFullError):
        lead_ins.choose_from(([i % 250, i // 250] for i in range(MOST_TOKENS)), indexing=False)
    assert held(lead_ins) == 0
