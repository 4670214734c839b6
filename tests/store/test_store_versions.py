"""A store written by any format version opens in this release, whatever release wrote it.

The folders of `data` were written once by `python tests/store/test_store_versions.py`, those of format 1 by a release that wrote it, and must never be
written again: when the format changes, folders for the new version join them.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from store_samples import Sample, flip, sample

from cachetune_store import ChunkStore, DamagedChunkError

DATA = Path(__file__).parent / "data"
KEY = bytes(range(32))
SEALS = {"": {}, "-key": {"store_key": KEY}, "-encrypted": {"store_key": KEY, "encrypt": True}}
"""Options of the stores that are kept, by how their folders' names end. Those with a key have one chunk only."""
WRITTEN = 2
"""The version that this release writes."""
DEVIATIONS = torch.arange(80).reshape(10, 8).half()
CODECS = ("exact", "int8", "fp8", "int4")
KEYS = {
    "exact": "692ee0ce17c5bc5851cf761ac7c7a6cc2e13b573dbaf6ad23202e20efbc18669",
    "int8": "6933ce4783e942d14f56b931bad00bf181778a174239d5e3e0acde124695a956",
    "fp8": "0a9a378bf822a2ec85f783d2e374831996f33fff54d13a83107170ae77ad6f99",
    "int4": "1fd17366b3e7b8f5c11a369ca1e376e6a4e42185c0d323c79d04268b31199b84",
}


def chunk(codec: str) -> Sample:
    return sample(100 + CODECS.index(codec), tokens=10, layers=2)


@pytest.fixture(params=[1, 2])
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def store(version: int, tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / f"format-{version}", tmp_path / "kv"))


@pytest.fixture(params=list(SEALS))
def sealed(request: pytest.FixtureRequest, version: int, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A store with any seal, and the options that it is opened with."""
    folder = shutil.copytree(DATA / f"format-{version}{request.param}", tmp_path / "sealed")
    return Path(folder), SEALS[request.param]


def versions_in(path: Path) -> list[str]:
    """The format version of each chunk file, by the files' names."""
    found = []
    for file in sorted((path / "chunks").rglob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found.append(opened.metadata()["format_version"])
    return found


@pytest.mark.parametrize("codec", CODECS)
def test_a_chunk_is_read(store: Path, codec: str) -> None:
    one = chunk(codec)
    assert one.key.digest == KEYS[codec]
    with ChunkStore(store) as opened, opened.open(one.key) as reader:  # type: ignore[union-attr]
        assert reader.layout.codec == codec
        assert reader.text == f"text of {codec}"
        assert reader.token_ids.tolist() == one.token_ids
        if codec == "exact":
            assert one.matches(reader)
        for layer in range(2):
            assert len(reader.read(layer, 10)) > 0
        deviations = reader.deviations
        assert (deviations is not None) == reader.has_deviations == (codec == "exact")
        if deviations is not None:
            assert torch.equal(deviations, DEVIATIONS)


def test_all_of_a_store_is_in_order(store: Path, version: int) -> None:
    assert versions_in(store) == [str(version)] * 4
    with ChunkStore(store) as opened:
        assert [(info.id, info.stored) for info in opened.documents()] == [("doc", 4)]
        report = opened.verify()
        assert (report.ok, report.checked, report.foreign) == (True, 4, 0)
        assert sorted(text for _, text, _ in opened.texts()) == sorted(f"text of {codec}" for codec in CODECS)


@pytest.mark.parametrize("host_budget", [0, "1GiB"])
def test_it_is_read_with_any_seal_and_comes_up(sealed: tuple[Path, dict[str, Any]], host_budget: object) -> None:
    path, options = sealed
    one = chunk("exact")
    with ChunkStore(path, host_budget=host_budget, **options) as store:
        for tier in ("disk", "host" if host_budget else "disk"):
            with store.open(one.key) as reader:
                assert (reader.tier, reader.text) == (tier, "text of exact")
                assert torch.equal(reader.deviations, DEVIATIONS)
                assert one.matches(reader)
        assert store.verify().ok


@pytest.mark.parametrize("place_of", ["first", "middle", "last"])
def test_damage_to_deviations_is_found_with_any_seal(sealed: tuple[Path, dict[str, Any]], place_of: str) -> None:
    path, options = sealed
    one = chunk("exact")
    (file,) = (file for file in (path / "chunks").rglob("*") if file.is_file() and _has_deviations(file))
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + length])["deviations"]["data_offsets"]
    flip(file, 8 + length + {"first": begin, "middle": (begin + end) // 2, "last": end - 1}[place_of])
    with ChunkStore(path, host_budget=0, **options) as store:
        reader = store.open(one.key)
        if reader is not None:  # in format 1 they are part of the head
            with reader, pytest.raises(DamagedChunkError):
                _ = reader.deviations
            assert store.discard(one.key)
        assert store.open(one.key) is None
        assert store.stats().damaged == 1


def _has_deviations(file: Path) -> bool:
    with safe_open(file, framework="pt") as opened:
        return "deviations" in opened.keys()  # noqa: SIM118 (it is no mapping)


def test_new_chunks_join_old_ones(sealed: tuple[Path, dict[str, Any]], version: int) -> None:
    """New files have the newest format, and old ones stay as they are: both are read, checked, pruned and found again without an index."""
    path, options = sealed
    old, new = chunk("exact"), sample(7, tokens=10, layers=2)
    before = len(versions_in(path))

    def put(one: Sample) -> None:
        store.put(
            one.key, one.layers, one.scores, namespace=one.namespace, token_ids=one.token_ids,
            text="text of exact", deviations=DEVIATIONS,
        )  # fmt: skip

    with ChunkStore(path, host_budget=0, **options) as store:
        put(old)
        put(new)
        assert sorted(versions_in(path)) == [str(version)] * before + [str(WRITTEN)], (
            "what is there isn't written again"
        )
        assert store.verify().ok
        assert store.rebuild_index().ok
        for one in (old, new):
            with store.open(one.key) as reader:
                assert torch.equal(reader.deviations, DEVIATIONS)
                assert one.matches(reader)
        assert store.tier("disk").remove(old.key)
        put(old)
        assert sorted(versions_in(path)) == [str(version)] * (before - 1) + [str(WRITTEN)] * 2
        with store.open(old.key) as reader:
            assert torch.equal(reader.deviations, DEVIATIONS)
            assert old.matches(reader)
        store.prune(lambda head: head.key != old.key)
        assert store.open(old.key) is None
        assert store.verify().ok


def test_a_shared_place_gets_chunks_in_the_newest_format(sealed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, options = sealed
    one, place = chunk("exact"), f"file://{tmp_path / 'place'}"
    with ChunkStore(path, remote=place, **options) as store:
        store.set_document("doc", [one.key])
        with store.open(one.key) as reader:
            assert one.matches(reader)
        store.put(
            one.key, one.layers, one.scores, namespace=one.namespace, token_ids=one.token_ids,
            text="text of exact", deviations=DEVIATIONS,
        )  # fmt: skip
        store.sync()
    with ChunkStore(place, **options) as other, other.open(one.key) as reader:
        assert reader.tier == "remote"
        assert torch.equal(reader.deviations, DEVIATIONS)
        assert one.matches(reader)


def write(folder: Path, codecs: Sequence[str] = CODECS, **options: Any) -> None:
    """Make the data."""
    for codec in codecs:
        with ChunkStore(folder, codec=codec, **options) as store:
            one = chunk(codec)
            store.put(
                one.key, one.layers, one.scores, namespace=one.namespace, token_ids=one.token_ids,
                text=f"text of {codec}", deviations=DEVIATIONS if codec == "exact" else None,
            )  # fmt: skip
    with ChunkStore(folder, **options) as store:
        store.set_document("doc", [chunk(codec).key for codec in codecs])
    shutil.rmtree(folder / "index")
    for leftover in ("lock", "index.lock", "tmp"):
        path = folder / leftover
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


if __name__ == "__main__":
    for ending, options in SEALS.items():
        folder = DATA / f"format-{WRITTEN}{ending}"
        if folder.exists():
            sys.exit(f"{folder} exists, and is to stay as it is")
        write(folder, CODECS[:1] if ending else CODECS, **options)
