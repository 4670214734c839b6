"""A store written by format version 1 opens in this release, whatever release wrote it.

`data/format-1` was written once by `python tests/store/test_store_versions.py` and must never be written again: when the format
changes, a folder for the new version joins it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from store_samples import Sample, sample

from cachetune_store import ChunkStore

DATA = Path(__file__).parent / "data" / "format-1"
CODECS = ("exact", "int8", "fp8", "int4")
KEYS = {
    "exact": "692ee0ce17c5bc5851cf761ac7c7a6cc2e13b573dbaf6ad23202e20efbc18669",
    "int8": "6933ce4783e942d14f56b931bad00bf181778a174239d5e3e0acde124695a956",
    "fp8": "0a9a378bf822a2ec85f783d2e374831996f33fff54d13a83107170ae77ad6f99",
    "int4": "1fd17366b3e7b8f5c11a369ca1e376e6a4e42185c0d323c79d04268b31199b84",
}


def chunk(codec: str) -> Sample:
    return sample(100 + CODECS.index(codec), tokens=10, layers=2)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA, tmp_path / "kv"))


@pytest.mark.parametrize("codec", CODECS)
def test_a_chunk_of_format_1_is_read(store: Path, codec: str) -> None:
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
        assert (deviations is not None) == (codec == "exact")
        if deviations is not None:
            assert torch.equal(deviations, torch.arange(80).reshape(10, 8).half())


def test_all_of_a_store_of_format_1_is_in_order(store: Path) -> None:
    with ChunkStore(store) as opened:
        assert [(info.id, info.stored) for info in opened.documents()] == [("doc", 4)]
        report = opened.verify()
        assert (report.ok, report.checked, report.foreign) == (True, 4, 0)
        assert sorted(text for _, text, _ in opened.texts()) == sorted(f"text of {codec}" for codec in CODECS)


def write(folder: Path) -> None:
    """Make the data."""
    for codec in CODECS:
        with ChunkStore(folder, codec=codec) as store:
            one = chunk(codec)
            deviations = torch.arange(80).reshape(10, 8).half() if codec == "exact" else None
            store.put(
                one.key, one.layers, one.scores, namespace=one.namespace, token_ids=one.token_ids,
                text=f"text of {codec}", deviations=deviations,
            )  # fmt: skip
    with ChunkStore(folder) as store:
        store.set_document("doc", [chunk(codec).key for codec in CODECS])
    shutil.rmtree(folder / "index")
    for leftover in ("lock", "index.lock", "tmp"):
        path = folder / leftover
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(write(DATA) if not DATA.exists() else f"{DATA} exists, and is to stay as it is")
