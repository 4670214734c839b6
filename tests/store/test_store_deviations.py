"""Deviations of chunks with several lead-ins come back from every tier, and damage to them is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from store_samples import file_of, flip, sample
from torch import Tensor

from cachetune_store import ChunkStore, NonFiniteError

COLUMNS = 12
"""Columns of a sample's deviations: keys and values of three layers with two heads."""
LEADS = {"lead_ins": ((1, 2), (1, 3))}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


def spread(tokens: int = 150) -> Tensor:
    return torch.rand(tokens, COLUMNS, generator=torch.Generator().manual_seed(9)).half()


def put(store: ChunkStore, deviations: Tensor | None, **changes: object) -> int:
    one = sample(**{**LEADS, **changes})
    return store.put(
        one.key,
        one.layers,
        one.scores,
        namespace=one.namespace,
        token_ids=one.token_ids,
        text="some text",
        deviations=deviations,
    )


@pytest.mark.parametrize("tokens", [1, 150])
@pytest.mark.parametrize("tier", ["host", "disk", "memory"])
def test_they_come_back_by_token(path: Path, tokens: int, tier: str) -> None:
    one = sample(tokens=tokens, **LEADS)
    with ChunkStore(None if tier == "memory" else path, host_budget=0 if tier == "disk" else "1GiB") as store:
        put(store, spread(tokens).float(), tokens=tokens)
        with store.open(one.key) as reader:
            assert reader.deviations.dtype == torch.float16
            assert torch.equal(reader.deviations, spread(tokens))
            assert reader.head.namespace.lead_ins == ((1, 2), (1, 3))
            assert reader.text == "some text"
            assert one.matches(reader)


def test_a_chunk_without_them_has_none(path: Path) -> None:
    with ChunkStore(path, host_budget=0) as store:
        put(store, None)
        with store.open(sample(**LEADS).key) as reader:
            assert reader.deviations is None
            assert reader.text == "some text"


def test_plain_safetensors_reads_them(path: Path) -> None:
    with ChunkStore(path) as store:
        put(store, spread())
    with safe_open(file_of(path, sample(**LEADS).key), framework="pt") as file:
        assert torch.equal(file.get_tensor("deviations"), spread())
        assert json.loads(file.metadata()["namespace"])["lead_ins"] == [[1, 2], [1, 3]]


def test_host_memory_counts_them() -> None:
    with ChunkStore(None, pin_memory=False) as store:
        assert put(store, spread(), seed=1) - put(store, None, seed=2) == 150 * COLUMNS * 2
        assert store.stats().host.bytes == put(store, None, seed=1) + put(store, None, seed=2)


def test_a_chunk_that_comes_up_from_disk_counts_them(path: Path) -> None:
    with ChunkStore(path, host_budget=0) as store:
        put(store, spread())
    with ChunkStore(path, pin_memory=False) as store, ChunkStore(None, pin_memory=False) as memory:
        with store.open(sample(**LEADS).key) as reader:
            assert reader.promote()
        assert store.stats().host.bytes == put(memory, spread())


def test_a_flipped_bit_in_them_is_a_miss(path: Path) -> None:
    with ChunkStore(path) as store:
        put(store, spread())
    file = file_of(path, sample(**LEADS).key)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + length])["deviations"]["data_offsets"]
    for place in (begin, (begin + end) // 2, end - 1):
        file.write_bytes(content)
        flip(file, 8 + length + place)
        with ChunkStore(path, host_budget=0) as store:
            assert store.open(sample(**LEADS).key) is None
    with ChunkStore(path) as store:
        assert put(store, spread()) == len(content)
        assert store.verify().ok
    assert file.read_bytes() == content


def test_what_is_no_deviation_of_the_chunk_is_refused(path: Path) -> None:
    with ChunkStore(path) as store:
        for wrong in (spread(149), spread()[:, 1:], spread()[0]):
            with pytest.raises(ValueError, match=r"deviations have shape .*\(150, 12\)"):
                put(store, wrong)
        for value in (float("nan"), float("inf"), 1e6):
            with pytest.raises(NonFiniteError, match="65504"):
                put(store, torch.full((150, COLUMNS), value))
        assert store.stats().disk.chunks == 0
