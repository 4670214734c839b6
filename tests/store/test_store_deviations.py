"""Deviations of chunks with several lead-ins come back from every tier, and damage to them is noticed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from store_samples import file_of, flip, sample
from torch import Tensor

from cachetune_store import ChunkStore, DamagedChunkError, NonFiniteError, StoreError, get_codec
from cachetune_store.chunkfile import parse_head
from cachetune_store.rawfile import DirectIO, RawFile
from cachetune_store.seals import CHECKSUMS
from cachetune_store.tiers import known_heads

COLUMNS = 12
"""Columns of a sample's deviations: keys and values of three layers with two heads."""
KEY = bytes(range(32))
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


SEALS = pytest.mark.parametrize(
    "options", [{}, {"store_key": KEY}, {"store_key": KEY, "encrypt": True}], ids=["plain", "key", "encrypted"]
)


def only_file(path: Path) -> Path:
    (file,) = (path / "chunks").rglob("*.safetensors")
    return file


def places_of(file: Path) -> tuple[int, int]:
    """Where the deviations begin and end in a chunk file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + length])["deviations"]["data_offsets"]
    return 8 + length + begin, 8 + length + end


@SEALS
@pytest.mark.parametrize("direct_io", [True, False])
def test_they_are_read_when_they_are_asked_for(
    path: Path, options: dict[str, Any], direct_io: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sample(**LEADS)
    with ChunkStore(path, **options) as store:
        put(store, spread())
    begin, end = places_of(only_file(path))
    reads = count_reads(monkeypatch)
    with ChunkStore(path, host_budget=0, direct_io=direct_io, **options) as store, store.open(one.key) as reader:
        assert len(reads) == 1, "the head, in one read"
        reader.read(0, 10)
        assert len(reads) == 2
        assert all(start + count <= begin for start, count in reads[1:])
        assert reader.has_deviations
        assert reader.deviations_wait
        assert torch.equal(reader.deviations, spread())
        assert reads[2:] == [(begin, -(-end // 4096) * 4096 - begin)]
        assert not reader.deviations_wait
        assert torch.equal(reader.deviations, spread())
        assert len(reads) == 3, "they are read once"
        assert one.matches(reader)


@SEALS
def test_a_head_that_was_read_is_known(path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the file is read before its rows are. Of an encrypted file the head is read again: it holds the file's key."""
    one = sample(**LEADS)
    with ChunkStore(path, host_budget=0, **options) as store:
        put(store, spread())
        store.open(one.key).close()
        reads = count_reads(monkeypatch)
        with store.open(one.key) as reader:
            assert len(reads) == ("encrypt" in options)
            assert one.matches(reader)
            assert reader.text == "some text"
            assert torch.equal(reader.deviations, spread())
        other = sample(7, **LEADS)
        other.put(store)
        only = len(reads)
        with store.open(other.key) as reader:
            assert len(reads) == only + 1
            assert other.matches(reader)
        assert store.tier("disk").remove(one.key)
        assert store.open(one.key) is None
        put(store, None)
        with store.open(one.key) as reader:
            assert reader.deviations is None, "another file of the same key"


def test_a_known_head_belongs_to_the_file_as_it_was(path: Path) -> None:
    one = sample(**LEADS)
    with ChunkStore(path, host_budget=0) as store:
        put(store, spread())
        store.open(one.key).close()
        content = only_file(path).read_bytes()
        only_file(path).unlink()
        with ChunkStore(path, host_budget=0, codec="int8") as other:
            put(other, None)
        with store.open(one.key) as reader:
            assert (reader.layout.codec, reader.deviations) == ("int8", None)
            assert one.matches(reader)
        only_file(path).write_bytes(content[:100] + b"?" + content[101:])
        errors: list[StoreError] = []
        assert store.open(one.key, errors=errors) is None
        assert len(errors) == 1


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Position and bytes of every read of a chunk file from now on."""
    reads: list[tuple[int, int]] = []
    real = os.preadv

    def preadv(fd: int, areas: list[memoryview], position: int) -> int:
        count = real(fd, areas, position)
        reads.append((position, count))
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    return reads


@SEALS
def test_a_flipped_bit_in_them_is_damage(path: Path, options: dict[str, Any]) -> None:
    one = sample(**LEADS)
    with ChunkStore(path, **options) as store:
        put(store, spread())
    content = only_file(path).read_bytes()
    begin, end = places_of(only_file(path))
    for place in (begin, (begin + end) // 2, end - 1):
        with ChunkStore(path, host_budget=0, **options) as store:
            flip(only_file(path), place)
            with store.open(one.key) as reader:
                assert one.matches(reader), "the rows are sound"
                with pytest.raises(DamagedChunkError, match="deviations"):
                    _ = reader.deviations
            assert store.discard(one.key)
            assert store.open(one.key) is None
            assert store.stats().damaged == 1
            assert put(store, spread()) == len(content)
            assert store.verify().ok
    if "encrypt" not in options:
        assert only_file(path).read_bytes() == content
    for place in (end, only_file(path).stat().st_size - 1):
        with ChunkStore(path, host_budget=0, **options) as store:
            flip(only_file(path), place)
            assert store.verify().damaged == (one.key,), "bytes behind them"
            put(store, spread())


@SEALS
def test_those_of_another_file_are_damage(path: Path, options: dict[str, Any]) -> None:
    """Bytes that the store itself has written, in another chunk's file or in place of a block of rows."""
    one, two = sample(**LEADS), sample(1, **LEADS)
    with ChunkStore(path, host_budget=0, **options) as store:
        put(store, spread())
        file = only_file(path)
        begin, _ = places_of(file)
        put(store, spread().flip(0), seed=1)
        content = file.read_bytes()
        (other,) = set((path / "chunks").rglob("*.safetensors")) - {file}
        file.write_bytes(content[:begin] + other.read_bytes()[begin:])
        with store.open(one.key) as reader, pytest.raises(DamagedChunkError):
            _ = reader.deviations
        with store.open(two.key) as reader:
            assert torch.equal(reader.deviations, spread().flip(0))


def test_closing_a_chunk_reads_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that has stopped answering must not hold up who closes a chunk. Whoever wants all of it in memory says so."""
    one = sample(**LEADS)
    with ChunkStore(path, host_budget=0) as store:
        put(store, spread())
    with ChunkStore(path) as store:
        reads = count_reads(monkeypatch)
        with store.open(one.key) as reader:
            assert one.matches(reader)
            before = len(reads)
        assert (len(reads), store.stats().host.chunks) == (before, 0)
        with store.open(one.key) as reader:
            assert one.matches(reader)
            assert torch.equal(reader.deviations, spread())
            before = len(reads)
        assert (len(reads), store.stats().host.chunks) == (before, 1), "all of it was read"
        assert torch.equal(store.open(one.key).deviations, spread())
    with ChunkStore(path) as store, store.open(one.key) as reader:
        assert reader.promote()
        assert store.stats().host.chunks == 1


def test_a_known_head_that_does_not_fit_is_forgotten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another content under the same name that looks like the same file: where times are coarse, say."""
    one = sample(**LEADS)
    monkeypatch.setattr(known_heads, "_state", lambda file: ())
    with ChunkStore(path, host_budget=0) as store:
        put(store, spread())
        store.open(one.key).close()
        only_file(path).unlink()
        with ChunkStore(path, host_budget=0) as other:
            other.put(
                one.key, [(k * 2, v * 2) for k, v in one.layers], one.scores, namespace=one.namespace,
                token_ids=one.token_ids, text="some text", deviations=spread(),
            )  # fmt: skip
        with store.open(one.key) as reader, pytest.raises(DamagedChunkError):
            reader.read(0, 150)
        assert not store.discard(one.key), "the file is good"
        with store.open(one.key) as reader:
            keys, _ = get_codec("exact").decode(reader.read(0, 150), reader.layout.layers[0], "float32")
            assert torch.equal(keys, 2 * one.layers[0][0][reader.order])


def test_times_that_are_copied_with_another_content_are_noticed(path: Path) -> None:
    one, file = sample(**LEADS), None
    with ChunkStore(path, host_budget=0) as store:
        put(store, spread())
        store.open(one.key).close()
        file = only_file(path)
        status, content = file.stat(), bytearray(file.read_bytes())
        content[200] ^= 1  # in the head
        with file.open("r+b") as opened:
            opened.write(content)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert store.open(one.key) is None
        assert store.stats().damaged == 1


def test_known_heads_are_counted_with_their_namespaces(path: Path) -> None:
    """Each namespace once, however many heads have it; and all is forgotten with the last of them."""
    heads, longest = known_heads.KnownHeads(1 << 30), tuple(range(1000))
    with ChunkStore(path, host_budget=0) as store:
        ones = [sample(n, tokens=10, layers=1, lead_ins=(longest,), tenant=str(n % 2)) for n in range(6)]
        sizes = []
        for number, one in enumerate(ones):
            one.put(store)
            file = RawFile(file_of(path, one.key), DirectIO(False))
            heads.keep(one.key, file, parse_head(one.key, file.size, file.head, CHECKSUMS))
            sizes.append(heads.bytes - sum(sizes))
            assert heads.find(one.key, file).head.namespace == one.namespace
            assert (sizes[number] > 40_000) == (number < 2), sizes
        for one in ones:
            heads.drop(one.key)
        assert heads.bytes == 0


def test_the_oldest_known_heads_make_room(path: Path) -> None:
    heads = known_heads.KnownHeads(30_000)
    with ChunkStore(path, host_budget=0) as store:
        kept = []
        for number in range(30):
            one = sample(number, tokens=10, layers=1)
            one.put(store)
            file = RawFile(file_of(path, one.key), DirectIO(False))
            heads.keep(one.key, file, parse_head(one.key, file.size, file.head, CHECKSUMS))
            kept.append((one.key, file))
            assert 0 < heads.bytes <= 30_000
        known = [heads.find(key, file) is not None for key, file in kept]
        assert 3 < sum(known) < 30
        assert known == sorted(known), "the newest ones"


def test_what_is_no_deviation_of_the_chunk_is_refused(path: Path) -> None:
    with ChunkStore(path) as store:
        for wrong in (spread(149), spread()[:, 1:], spread()[0]):
            with pytest.raises(ValueError, match=r"deviations have shape .*\(150, 12\)"):
                put(store, wrong)
        for value in (float("nan"), float("inf"), 1e6):
            with pytest.raises(NonFiniteError, match="65504"):
                put(store, torch.full((150, COLUMNS), value))
        assert store.stats().disk.chunks == 0
