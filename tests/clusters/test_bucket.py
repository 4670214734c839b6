"""Precompute on a real Ray cluster where corpus and store are in a bucket of a real S3 server, and the store is encrypted."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")
pytest.importorskip("pyarrow")
pytest.importorskip("obstore")

import obstore
import torch
from obstore.store import S3Store
from remote_servers import BUCKET, KEY, SECRET, s3_options
from stored import CUT, ROWS, by_one_process, contents

import cachetune_ray
from cachetune_store import ChunkStore, StoreKeyError

pytestmark = pytest.mark.cluster


def put_corpus(port: int) -> None:
    """Each document once, in files of three kinds."""
    import pyarrow
    from pyarrow import parquet

    store = S3Store(BUCKET, **s3_options(port))
    for row in ROWS[:5]:
        obstore.put(store, f"corpus/{row['id']}.txt", row["text"].encode())
    table = io.BytesIO()
    parquet.write_table(pyarrow.table({name: [row[name] for row in ROWS[5:]] for name in ("id", "text")}), table)
    obstore.put(store, "corpus/below/table.parquet", table.getvalue())


def test_corpus_and_encrypted_store_in_a_bucket(cluster: None, s3_port: int, model: Path, tmp_path: Path) -> None:
    put_corpus(s3_port)
    where = f"scheme=http&endpoint_override=127.0.0.1:{s3_port}&region=us-east-1"
    corpus = cachetune_ray.read_corpus([f"s3://{KEY}:{SECRET}@{BUCKET}/corpus?{where}"])
    sealed: dict[str, Any] = {"store_key": b"k" * 32, "encrypt": True}
    options = {"remote_options": s3_options(s3_port)}
    url = f"s3://{BUCKET}/ray"
    summary = cachetune_ray.precompute(corpus, model, url, actors=2, **sealed, **options, **CUT)
    found = contents(model, url, **sealed, **options)
    one = by_one_process(model, tmp_path / "one")
    assert {name.removesuffix(".txt"): len(keys) for name, keys in found.items()} == {k: len(v) for k, v in one.items()}
    assert (summary.documents, summary.failed) == (len(ROWS), ())
    again = cachetune_ray.precompute(corpus, model, url, actors=1, **sealed, **options, **CUT)
    assert (again.chunks, again.documents) == (0, len(ROWS))
    for given, said in (({"store_key": b"w" * 32}, "with another key"), ({}, "none is given")):
        with pytest.raises(StoreKeyError, match=said):
            cachetune_ray.precompute(corpus, model, url, actors=1, **given, **options, **CUT)

    store = S3Store(BUCKET, **s3_options(s3_port))
    objects = [bytes(obstore.get(store, each["path"]).bytes()) for page in obstore.list(store, "ray") for each in page]
    assert objects
    assert not [content for content in objects if b"Sentence" in content]
    keys = [key for document in one.values() for key in document]
    with ChunkStore(tmp_path / "one") as plain, ChunkStore(url, **sealed, **options) as hidden:
        for key in keys:
            with plain.open(key) as expected, hidden.open(key) as reader:
                layers, rows = len(reader.layout.layers), reader.layout.tokens
                assert all(torch.equal(reader.read(n, rows), expected.read(n, rows)) for n in range(layers))
