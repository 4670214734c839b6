"""Every byte that is read from disk is checked, and nothing can turn that off."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from store_samples import file_of, flip, sample

import cachetune_store
from cachetune_store import ChunkReader, ChunkStore, DamagedChunkError, codec_names, seals
from cachetune_store.chunk import BLOCK_ROWS

LAYERS, TOKENS = 3, 150


def read_rows(rows: int) -> Callable[[ChunkReader], object]:
    return lambda reader: [reader.read(layer, rows) for layer in range(LAYERS)]


def read_growing(reader: ChunkReader) -> None:
    for rows in (1, 63, 64, 65, TOKENS):
        read_rows(rows)(reader)


PATHS: dict[str, Callable[[ChunkReader], object]] = {
    "all rows": read_rows(TOKENS),
    "more and more rows": read_growing,
    "by address": lambda reader: [reader.locate(layer, TOKENS) for layer in range(LAYERS)],
    "into host memory": lambda reader: reader.promote(),
}


@pytest.mark.parametrize("codec", codec_names())
@pytest.mark.parametrize("direct_io", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_every_row_read_from_disk_was_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, direct_io: bool, path: str
) -> None:
    one = sample(tokens=TOKENS, layers=LAYERS)
    hashed: set[bytes] = set()
    real = seals.rows_checksum
    with ChunkStore(tmp_path, codec=codec, direct_io=direct_io) as store:
        one.put(store)
    with ChunkStore(tmp_path, codec=codec, direct_io=direct_io) as store, store.open(one.key) as reader:
        with monkeypatch.context() as patch:
            patch.setattr(seals, "rows_checksum", lambda data: (hashed.add(bytes(data)), real(data))[1])
            PATHS[path](reader)
        for layer in range(LAYERS):
            rows, form = reader.read(layer, TOKENS), reader.head.plan.rows[layer]
            ends = [form.size(min(row, TOKENS)) for row in range(0, TOKENS + BLOCK_ROWS, BLOCK_ROWS)]
            for start, end in pairwise(ends):
                assert rows[start:end].numpy().tobytes() in hashed


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_damage_in_any_layer_stops_every_way_of_reading(tmp_path: Path, path: str, layer: int) -> None:
    one = sample(tokens=TOKENS, layers=LAYERS)
    with ChunkStore(tmp_path) as store:
        one.put(store)
        with store.open(one.key) as reader:
            start = file_of(tmp_path, one.key).stat().st_size - reader.head.plan.total
            offset = reader.head.plan.offsets[layer]
    flip(file_of(tmp_path, one.key), start + offset + 77)
    with ChunkStore(tmp_path) as store, store.open(one.key) as reader, pytest.raises(DamagedChunkError):
        PATHS[path](reader)


def test_no_option_and_no_environment_variable_turns_checks_off() -> None:
    options = set(inspect.signature(ChunkStore).parameters)
    known = {
        "path",
        "codec",
        "host_budget",
        "disk_budget",
        "device_budget",
        "device",
        "pin_memory",
        "read_memory",
        "direct_io",
        # What comes from a shared place is read and checked as what comes from the disk.
        "remote",
        "remote_codec",
        "remote_timeout",
        "remote_options",
        # Sums with a secret in place of those without.
        "store_key",
        # The rows hidden as well, with sums of the same length.
        "encrypt",
    }
    assert options == known, "a new option: is it safe?"
    for file in Path(cachetune_store.__file__).parent.rglob("*.py"):
        if file.name == "storekey.py":
            continue  # it reads the variable that the caller has named, which holds the store's key
        names = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"environ", "getenv", "environb"}, f"{file} depends on the environment"
