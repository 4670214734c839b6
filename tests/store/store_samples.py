"""Small chunks to store, and functions that other processes run on them."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cachetune_store import ChunkKey, ChunkReader, ChunkStore, Namespace, StoreError, get_codec, make_key

NAMESPACE = Namespace("model", "tokenizer", "float32", ((1,),))


@dataclass
class Sample:
    key: ChunkKey
    layers: list[tuple[Tensor, Tensor]]
    scores: Tensor
    namespace: Namespace
    token_ids: list[int]

    def put(self, store: ChunkStore, text: str | None = None) -> int:
        return store.put(
            self.key, self.layers, self.scores, namespace=self.namespace, token_ids=self.token_ids, text=text
        )

    def matches(self, reader: ChunkReader) -> bool:
        """Whether every number comes back at its token, bit for bit as the codec makes it."""
        codec = get_codec(reader.layout.codec)
        for index, (k, v) in enumerate(self.layers):
            rows = reader.read(index, reader.layout.tokens)
            k2, v2 = codec.decode(rows, reader.layout.layers[index], reader.layout.dtype)
            k, v = k[reader.order], v[reader.order]
            if reader.layout.codec != "exact":
                k, v = codec.decode(codec.encode(k, v), reader.layout.layers[index], reader.layout.dtype)
            if not (torch.equal(k2, k) and torch.equal(v2, v)):
                return False
        return True


def sample(seed: int = 0, *, tokens: int = 150, layers: int = 3, **changes: Any) -> Sample:
    namespace = Namespace(**({f: getattr(NAMESPACE, f) for f in NAMESPACE.__dataclass_fields__} | changes))
    g = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, namespace.dtype)
    ids = torch.randint(0, 50000, (tokens,), generator=g).tolist()
    kv = [
        (torch.randn(tokens, 2, 8, generator=g).to(dtype), torch.randn(tokens, 2, 12, generator=g).to(dtype))
        for _ in range(layers)
    ]
    return Sample(make_key(namespace, ids), kv, torch.rand(tokens, generator=g), namespace, ids)


def file_of(store_path: Path, key: ChunkKey) -> Path:
    return store_path / "chunks" / key.digest[:2] / f"{key.digest}.safetensors"


def flip(path: Path, position: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


_CLAIM = (
    "import os, signal, sys; from pathlib import Path; from cachetune_store.claims import FileClaims; "
    "from cachetune_store.keys import ChunkKey; path, *digests = sys.argv[1:]; "
    "claim = FileClaims(Path(path)).claim(map(ChunkKey, digests)); os.kill(os.getpid(), signal.SIGSTOP); sys.stdin.read()"
)


@contextmanager
def claimed_and_stopped(store: Path, keys: Sequence[ChunkKey]) -> Iterator[int]:
    """A process that has claimed these chunks of the store at `store`, and is stopped. Its id."""
    command = [sys.executable, "-c", _CLAIM, store / "claims.lock", *(key.digest for key in keys)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            os.waitpid(process.pid, os.WUNTRACED)
            yield process.pid
        finally:
            process.kill()


def write_until_killed(path: str, codec: str, started: Any) -> None:
    """Store chunks until the parent kills this process."""
    torch.set_num_threads(1)
    store = ChunkStore(path, codec=codec)
    seed = 0
    while True:
        sample(seed, tokens=600).put(store, text=str(seed))
        seed += 1
        started.set()


def die_while_writing(path: str) -> None:
    """Be killed after the last byte is written and before the file is renamed."""
    store = ChunkStore(path)
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.kill(os.getpid(), signal.SIGKILL)
        real(fd)

    os.fsync = fsync
    sample(1).put(store)


def die_after(path: str, call: str, action: str) -> None:
    """Be killed after the first `call` that renames or deletes the file of a chunk or document, before the index is committed."""
    store = ChunkStore(path, disk_budget=150_000, host_budget=0)
    real = getattr(os, call)

    def last_call(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        if Path(args[-1]).suffix in {".safetensors", ".json"}:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, call, last_call)
    if action == "put":
        sample(9).put(store)
    else:
        store.set_document("d", [sample(1).key])


def use_at_random(path: str, codec: str, seed: int, rounds: int, budget: int, results: Any) -> None:
    """Store, read and delete with a budget that forces evictions, and report errors."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    samples = [sample(i, tokens=100) for i in range(8)]
    wrong: list[str] = []
    hits = 0
    try:
        with ChunkStore(path, codec=codec, disk_budget=budget, host_budget=0) as store:
            for _ in range(rounds):
                one = rng.choice(samples)
                action = rng.random()
                if action < 0.4:
                    one.put(store, text="text")
                elif action < 0.5:
                    store.set_document(f"doc{rng.randrange(3)}", [one.key, rng.choice(samples).key])
                else:
                    with store.open(one.key) or _Nothing() as reader:
                        if reader is not None:
                            hits += 1
                            if not one.matches(reader):
                                wrong.append(f"wrong rows of {one.key}")
            if store.stats().damaged:
                wrong.append("damaged files")
            if store.stats().disk.bytes > budget:
                wrong.append("over budget")
    except BaseException as error:
        wrong.append(repr(error))
    results.put((hits, wrong))


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def read(store: ChunkStore, one: Sample) -> bool:
    """Whether a chunk is there, and right in every number. Damage may show when its head is read, or its rows are."""
    reader = store.open(one.key)
    if reader is None:
        return False
    with reader:
        try:
            return one.matches(reader)
        except StoreError:
            assert store.discard(one.key)
            return False
