"""The chunk file: what a reader of safetensors sees, and that damage is noticed."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from store_samples import file_of, flip, sample

from cachetune_store import ChunkKey, ChunkStore, DamagedChunkError, LayerSpec, chunk, get_codec, register_codec
from cachetune_store.chunkfile import parse_head
from cachetune_store.codecs import ExactCodec, base
from cachetune_store.seals import CHECKSUMS

CODECS = pytest.mark.parametrize("codec", ["exact", "fp8", "int4", "int8"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


def stored(path: Path, codec: str = "exact", **changes: object) -> Path:
    with ChunkStore(path, codec=codec) as store:
        sample(**changes).put(store, text="some text")
    return file_of(path, sample(**changes).key)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_plain_safetensors_reads_numbers(path: Path, dtype: str) -> None:
    one = sample(dtype=dtype)
    with safe_open(stored(path, dtype=dtype), framework="pt") as file:
        order = file.get_tensor("order")
        for index, (k, v) in enumerate(one.layers):
            rows = file.get_tensor(f"layer.{index}")
            assert rows.dtype == k.dtype
            assert torch.equal(rows, torch.cat([k.flatten(1), v.flatten(1)], 1)[order])
        assert file.get_tensor("token_ids").tolist() == one.token_ids
        assert torch.equal(file.get_tensor("scores"), one.scores)
        assert bytes(file.get_tensor("text").tolist()) == b"some text"
        assert file.metadata()["key"] == str(one.key)


# int4: 3 groups of 16 channels' scales and middles; 2 heads' scales and middles, 16 and 24 steps
@pytest.mark.parametrize(
    ("codec", "shape"),
    [("int8", (150, 2 * (8 + 8 + 12))), ("fp8", (150, 2 * (8 + 8 + 12))), ("int4", (3 * 64 + 150 * (8 + 8 + 12),))],
)
def test_plain_safetensors_reads_quantised_rows_as_bytes(path: Path, codec: str, shape: tuple[int, ...]) -> None:
    one = sample()
    with safe_open(stored(path, codec), framework="pt") as file:
        rows = file.get_tensor("layer.0")
        assert rows.dtype == torch.uint8
        assert rows.shape == shape
        k, v = (numbers[file.get_tensor("order")] for numbers in one.layers[0])
        assert torch.equal(rows.flatten(), get_codec(codec).encode(k, v))


@CODECS
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 150])
def test_every_layer_begins_on_a_page(path: Path, tokens: int, codec: str) -> None:
    content = stored(path, codec, tokens=tokens).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for index in range(3):
        assert (8 + length + header[f"layer.{index}"]["data_offsets"][0]) % 4096 == 0
    assert len(content) % 4096 == 0


def test_rows_stand_in_ranking_order_with_ties(path: Path) -> None:
    one = sample(tokens=6)
    one.scores = torch.tensor([0.5, 0.1, 0.5, 0.9, 0.1, 0.5])
    with ChunkStore(path) as store:
        one.put(store)
        with store.open(one.key) as reader:
            # Backwards it is "descending score, ties to the smaller index": 3, 0, 2, 5, 1, 4.
            assert reader.order.tolist() == [4, 1, 5, 2, 0, 3]
            assert torch.equal(reader.scores, one.scores)
            assert one.matches(reader)


@pytest.mark.parametrize("direct_io", [True, False])
@CODECS
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 100, 128, 149, 150])
def test_any_prefix_of_rows_is_read_and_checked(path: Path, rows: int, direct_io: bool, codec: str) -> None:
    one = sample()
    stored(path, codec)
    with ChunkStore(path, host_budget=0, direct_io=direct_io) as store, store.open(one.key) as reader:
        k, v = one.layers[1]
        whole = get_codec(codec).encode(k[reader.order], v[reader.order])
        wanted = whole[: size_of(codec, rows)]
        assert torch.equal(reader.read(1, rows), wanted)
        assert torch.equal(reader.read(1, 150), whole)  # reading on from there
        assert torch.equal(reader.read(1, rows), wanted)


def size_of(codec: str, rows: int) -> int:
    """Bytes of the first rows of a sample's layer."""
    return get_codec(codec).row_format(LayerSpec(2, 8, 12), "float32").size(rows)


@CODECS
@pytest.mark.parametrize("block_rows", [1, 16, 64, 100])
def test_blocks_of_any_length_are_checked(
    path: Path, codec: str, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk, "BLOCK_ROWS", block_rows)
    monkeypatch.setattr(chunk, "ChunkHead", partial(chunk.ChunkHead, block_rows=block_rows))
    one = sample(tokens=1500)
    file = stored(path, codec, tokens=1500)
    for rows in (1, 70, 1200, 1500):
        with ChunkStore(path, host_budget=0) as store, store.open(one.key) as reader:
            assert reader.head.block_rows == block_rows
            reader.read(1, rows)
            assert one.matches(reader)
    flip(file, layer_start(file, 1) + size_of(codec, 900) - 1)
    with ChunkStore(path, host_budget=0) as store, store.open(one.key) as reader:
        reader.read(1, 800)
        with pytest.raises(DamagedChunkError, match=f"layer 1, block {899 // block_rows}"):
            reader.read(1, 900)


@CODECS
def test_a_prefix_that_ends_inside_a_damaged_block_is_refused(path: Path, codec: str) -> None:
    file = stored(path, codec)
    one = sample()
    # Row 70 is in the second block of 64; what its rows share comes before the first of them.
    for place in (size_of(codec, 70), size_of(codec, 64)):
        flip(file, layer_start(file, 1) + place)
        with ChunkStore(path, host_budget=0) as store, store.open(one.key) as reader:
            assert reader.read(1, 64).numel() == size_of(codec, 64)
            with pytest.raises(DamagedChunkError, match="layer 1, block 1"):
                reader.read(1, 65)
            assert reader.read(0, 150).numel() == size_of(codec, 150)
        flip(file, layer_start(file, 1) + place)


def layer_start(file: Path, layer: int) -> int:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return 8 + length + json.loads(content[8 : 8 + length])[f"layer.{layer}"]["data_offsets"][0]


def usable(path: Path, key: ChunkKey) -> bool:
    """Whether a user gets rows, rather than a miss or a DamagedChunkError."""
    with ChunkStore(path, host_budget=0) as store:
        reader = store.open(key)
        if reader is None:
            return False
        with reader:
            try:
                for layer in range(3):
                    reader.read(layer, 150)
            except DamagedChunkError:
                store.discard(key)
                return False
    return True


@CODECS
def test_every_flipped_bit_is_found_before_use(path: Path, codec: str) -> None:
    file = stored(path, codec)
    size = size_of(codec, 150)
    key = sample().key
    good = file.read_bytes()
    rng = random.Random(0)
    rows = layer_start(file, 0)
    header = 8 + int.from_bytes(good[:8], "little")
    places = [*range(8), 8, 9, header - 1, header, header + 15, header + 16, rows - 1]
    places += [rng.randrange(header) for _ in range(25)] + [rng.randrange(header, rows) for _ in range(25)]
    for layer in range(3):
        start = layer_start(file, layer)
        places += [start, start + size - 1] + [rng.randrange(start, start + size) for _ in range(8)]
    for place in places:
        file.write_bytes(good)
        flip(file, place, rng.randrange(8))
        assert not usable(path, key), f"byte {place}"
        assert not file.exists()
    file.write_bytes(good)
    assert usable(path, key)


def test_verify_finds_a_flip_between_the_layers_too(path: Path) -> None:
    file = stored(path)
    flip(file, layer_start(file, 1) - 1)
    with ChunkStore(path) as store:
        assert store.verify().damaged == (sample().key,)
        assert store.open(sample().key) is None


@pytest.mark.parametrize("left", [0, 1, 7, 8, 100, 4095, 4096, 9000, 12288, -4096, -1])
@CODECS
def test_a_truncated_file_is_a_miss(path: Path, left: int, codec: str) -> None:
    file = stored(path, codec)
    content = file.read_bytes()
    file.write_bytes(content[:left])
    assert not usable(path, sample().key)
    file.write_bytes(content + b"\0" * 4096)
    assert not usable(path, sample().key)


def test_a_damaged_file_is_set_aside_and_counted(path: Path) -> None:
    file = stored(path)
    flip(file, 100)
    with ChunkStore(path) as store:
        assert store.contains(sample().key)
        assert store.open(sample().key) is None
        assert not store.contains(sample().key)
        assert store.stats().damaged == 1
        assert store.stats().disk.chunks == 0
        assert len(list((path / "damaged").iterdir())) == 1
        sample().put(store)
        assert usable(path, sample().key)


def test_what_is_set_aside_is_bounded(path: Path) -> None:
    with ChunkStore(path, host_budget=0) as store:
        for seed in range(20):
            one = sample(seed, tokens=5)
            one.put(store)
            flip(file_of(path, one.key), 100)
            assert store.open(one.key) is None
        assert store.stats().damaged == 20
        assert len(list((path / "damaged").iterdir())) == 16


def forge(file: Path, **changes: object) -> None:
    """Change header entries of a chunk file and give it a valid digest, as an attacker (or a bug) could."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, value in changes.items():
        if name in header["__metadata__"]:
            header["__metadata__"][name] = value
        else:
            header[name.replace("_", ".")] = value
    raw = json.dumps(header).encode()
    raw = raw.ljust(-(-(8 + len(raw)) // 4096) * 4096 - 8)
    front = len(raw).to_bytes(8, "little") + raw
    small = content[8 + length + 16 : layer_start(file, 0)]
    digest = xxhash.xxh3_128(front + small).digest()
    file.write_bytes(front + digest + small + content[layer_start(file, 0) :])


def layout(**changes: object) -> str:
    good = {
        "tokens": 150,
        "dtype": "float32",
        "codec": "exact",
        "layers": [[2, 8, 12]] * 3,
        "block_rows": 64,
        "text_bytes": 9,
        "deviations": False,
    }
    return json.dumps(good | changes)


def namespace(**changes: object) -> str:
    return json.dumps({"model": "model", "tokenizer": "tokenizer", "dtype": "float32", "tenant": ""} | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": layout(tokens=10**15)},
        {"layout": layout(tokens=1 << 39)},
        {"layout": layout(tokens=-1)},
        {"layout": layout(tokens=True)},
        {"layout": layout(tokens=149)},
        {"layout": layout(block_rows=0)},
        {"layout": layout(block_rows=32)},
        {"layout": layout(text_bytes=1 << 30)},
        {"layout": layout(layers=[])},
        {"layout": layout(layers=[[2, 8, 12]] * 4)},
        {"layout": layout(layers=[[2, 8]] * 3)},
        {"layout": layout(layers=5)},
        {"layout": layout(deviations=True)},
        {"layout": layout(deviations=0)},
        {"layout": layout(deviations=None)},
        {"layout": layout(dtype="float64")},
        {"layout": layout(dtype=5)},
        {"layout": layout(codec="int8")},
        {"layout": layout(codec="int4")},
        {"layout": "[" * 100_000},
        {"layout": "null"},
        {"layout": 7},
        {"namespace": "{}"},
        {"namespace": namespace(lead_ins=[])},
        {"namespace": namespace(lead_ins=[1])},
        {"namespace": namespace(lead_ins=[[True]])},
        {"namespace": namespace(lead_ins=[[1 << 70]])},
        {"namespace": namespace(lead_ins=5)},
        {"format_version": "3"},
        {"format_version": 2},
        {"key": "0" * 64},
        {"layer_0": {"dtype": "F32", "shape": [150, 40], "data_offsets": [0, 24000]}},
        {"layer_9": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
    ],
)
def test_a_forged_header_is_a_miss(path: Path, changes: dict[str, object]) -> None:
    file = stored(path)
    forge(file, layout=layout(), namespace=namespace(lead_ins=[[1]]))
    assert usable(path, sample().key), "the forgery itself is sound"
    forge(file, **changes)
    assert not usable(path, sample().key)


def test_a_huge_header_length_allocates_nothing(path: Path) -> None:
    asked: list[int] = []

    def read(count: int) -> memoryview:
        asked.append(count)
        return memoryview((2**63 - 8).to_bytes(8, "little"))

    with pytest.raises(DamagedChunkError):
        parse_head(sample().key, 2**63, read, CHECKSUMS)
    assert asked == [8]


def test_random_bytes_are_never_more_than_damaged() -> None:
    rng = random.Random(1)
    for _ in range(300):
        body = rng.randbytes(rng.randrange(64)) if rng.random() < 0.5 else b'{"__metadata__":{"layout":"[]"}}'
        raw = (4088).to_bytes(8, "little") + body.ljust(4088)
        with pytest.raises(DamagedChunkError):
            parse_head(sample().key, len(raw), lambda count, raw=raw: memoryview(raw), CHECKSUMS)


def test_a_file_under_another_name_is_a_miss(path: Path) -> None:
    file = stored(path)
    other = sample(1).key
    target = file_of(path, other)
    target.parent.mkdir(exist_ok=True)
    file.rename(target)
    assert not usable(path, other)


def test_a_file_of_a_codec_that_is_not_loaded_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plugin(ExactCodec):
        name = "plugin"

    register_codec(Plugin())
    try:
        file = stored(path, "plugin")
        assert usable(path, sample().key)
        monkeypatch.delitem(base.CODECS, "plugin")
        assert not usable(path, sample().key)
        with ChunkStore(path) as store:
            assert store.verify().ok
        assert file.exists()
    finally:
        base.CODECS.pop("plugin", None)
