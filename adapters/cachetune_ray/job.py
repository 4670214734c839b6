"""Precompute on a Ray cluster. Ray Data reads, hands out and repeats; this package's own engine computes and stores."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import ray

from cachetune_rag.checking.arguments import check_callback, check_count
from cachetune_rag.errors import ConfigError
from cachetune_rag.options import ENGINE_NAMES, check_names
from cachetune_rag.report import PrecomputeSummary
from cachetune_rag.text.splitting import DEFAULT_CHUNK_TOKENS, MIN_CHUNK_TOKENS
from cachetune_ray import failures
from cachetune_ray.documents import Columns
from cachetune_ray.here import gpus, on_this_machine
from cachetune_ray.tries import RemoteTries
from cachetune_ray.work import WORK_TOKENS, Cutter
from cachetune_ray.worker import EngineToMake, Worker
from cachetune_store import ChunkStore
from cachetune_store.paths import store_path
from cachetune_store.printing import shown
from cachetune_store.remote.places import is_remote
from cachetune_store.storekey import StoreKey

FIRST_CHARACTERS = 1 << 20
"""Characters of the first documents, from which lead-ins are chosen: enough for the tokens that are looked at."""
BLOCK_BYTES = 4 << 20
"""Most bytes that are read before they are cut, and cut before they are handed out: the first actor need not wait for a whole file."""


@dataclass(frozen=True)
class RaySummary(PrecomputeSummary):
    """What a precompute job on a cluster did, or has done so far.

    Attributes:
        size: bytes of the documents in their files that are done, with those of what was left out.
        evicted: chunks that had to make room.
        workers: processes that computed something.
        empty: ids of documents without text, which are not stored.
        failed: files in folders that can't be read, each with the reason.
    """

    size: int = 0
    evicted: int = 0
    workers: int = 0
    empty: tuple[str, ...] = ()
    failed: tuple[tuple[str, str], ...] = ()

    @property
    def plain(self) -> PrecomputeSummary:
        """What a job on one machine says of itself."""
        return PrecomputeSummary(**{each.name: getattr(self, each.name) for each in fields(PrecomputeSummary)})


def precompute(
    dataset: Any,
    model: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    actors: int | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    work_tokens: int = WORK_TOKENS,
    id_column: str = "id",
    text_column: str = "text",
    chunks_column: str = "chunks",
    gguf_file: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    num_cpus: float = 1,
    num_gpus: float | None = None,
    same_model_only: bool = False,
    progress: Callable[[RaySummary], None] | None = None,
    **options: Any,
) -> RaySummary:
    """Compute and store the KV of a dataset's documents on the Ray cluster that this process is connected to.

    Each actor loads the model once. Chunks that are stored already are skipped, so an interrupted run resumes. Where an actor dies, Ray
    starts another, which goes on with the row of work that the dead one had begun. A row with which three actors died ends the job.

    Args:
        dataset: a dataset of Ray Data, from `ray.data.read_parquet`, `cachetune_ray.read_corpus` or any other reader. A row is a document. Ids must be unique.
        model: a folder that is at the same path on all machines, or a hub id.
        store: URL of a place that machines share (`s3://bucket/prefix`, see docs/scale.md), or a folder. Where there is a folder and no `remote`,
            all actors run on this machine.
        actors: how many; None: one for each GPU that the cluster has now, and one where it has none.
        chunk_tokens: most tokens of a chunk that a text is cut into.
        work_tokens: tokens that are handed to an actor at once.
        id_column, text_column, chunks_column: columns of a document's id, and of its text (which is split) or its list of chunks (which are kept).
        gguf_file, device, dtype, revision: as for `CacheTune.from_pretrained`.
        num_cpus, num_gpus: what an actor takes of a machine; GPUs: 1 where the cluster has any.
        same_model_only: refuse a store that has nothing but chunks of other models.
        progress: called with a summary of what is done after every row of work.
        options: further arguments of the engine and its store (docs/options.md): codec, tenant, lead_in, remote, ...

    Raises:
        ConfigError: an argument or a document can't be used, or two documents have the same id. What was stored before stays.
        CacheTuneError, StoreError: what the engine raised in an actor; or three actors died with the same documents.
    """
    _check_dataset(dataset)
    columns = Columns(id_column, text_column, chunks_column)
    for name, value in (("id_column", id_column), ("text_column", text_column), ("chunks_column", chunks_column)):
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{name} is {shown(value)}: use the name of a column.")
    if actors is not None:
        check_count(actors, "actors", "a whole number, or None for one a GPU")
    check_count(chunk_tokens, "chunk_tokens", f"{MIN_CHUNK_TOKENS} or more (512 is a good size)", MIN_CHUNK_TOKENS)
    check_count(work_tokens, "work_tokens", f"a whole number (default: {WORK_TOKENS})")
    check_callback(progress, "progress")
    check_names(options, (*ENGINE_NAMES, "num_cpus", "num_gpus"), "cachetune_ray.precompute")
    if not isinstance(model, str | os.PathLike) or not os.fspath(model):
        raise ConfigError(f"model is {shown(model)}: use a folder made by save_pretrained, or a hub id.")
    place = _place_of(store)
    here = not is_remote(place) and options.get("remote") is None
    on_it = on_this_machine(f"the store {place}") if here else {}
    if (known := dataset.schema(fetch_if_missing=False)) is not None:  # otherwise the first row says it
        columns.check(known.names)

    name = os.fspath(model)
    cutter = Cutter(_absolute(name), gguf_file, revision, chunk_tokens, work_tokens, columns)
    loading = {
        "host_budget": 0,
        **options,
        # Read here, because a file or a variable may be another one where the actors are; and Ray shows what it is given.
        "store_key": StoreKey.given(options.get("store_key")),
        "device": device,
        "dtype": dtype,
        "gguf_file": gguf_file,
        "revision": revision,
    }
    first = _first_rows(dataset, columns) if options.get("lead_in", "auto") == "auto" else []
    made = EngineToMake(
        cutter.model, place, loading, first, cutter, tries=RemoteTries(), same_model_only=same_model_only
    )
    size, gpus_each = pool_of(device, actors, num_gpus, gpus(here=here))
    rows = (
        dataset.map_batches(cutter, batch_size=None, batch_format="pyarrow")
        .repartition(target_num_rows_per_block=1)
        .map(
            Worker,
            fn_constructor_args=(made,),
            compute=ray.data.ActorPoolStrategy(size=size),
            num_cpus=num_cpus,
            num_gpus=gpus_each,
            **on_it,
        )
    )
    rows.context.target_max_block_size = BLOCK_BYTES
    done = _Done(progress)
    for row in rows.iter_rows():
        done.add(row)
    return done.summary


def pool_of(device: str, actors: int | None, num_gpus: float | None, found: int) -> tuple[int, float]:
    """How many actors there are, and what each takes of a GPU.

    Args:
        device: as the caller gave it. On a CPU, no GPU is taken.
        actors, num_gpus: as the caller gave them.
        found: GPUs that there are.
    """
    usable = 0 if device == "cpu" else found
    return actors or max(1, usable), (1 if usable else 0) if num_gpus is None else num_gpus


class _Done:
    """Adds up what actors return.

    Args:
        progress: told after every row.
    """

    def __init__(self, progress: Callable[[RaySummary], None] | None):
        self._progress, self._started = progress, time.perf_counter()
        self._ids: set[bytes] = set()
        self._workers: set[str] = set()
        self._sums = dict.fromkeys(("documents", "chunks", "skipped", "tokens", "bytes", "size", "evicted"), 0)
        self._empty: list[str] = []
        self._failed: list[tuple[str, str]] = []
        self._lead_ins = 1

    @property
    def summary(self) -> RaySummary:
        return RaySummary(
            **self._sums,
            seconds=time.perf_counter() - self._started,
            lead_ins=self._lead_ins,
            workers=len(self._workers),
            empty=tuple(self._empty),
            failed=tuple(self._failed),
        )

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row of work.

        Raises:
            ConfigError: a document's id was there before.
            CacheTuneError, StoreError: the row brings this error.
        """
        failures.check(row)
        for name in self._sums:
            self._sums[name] += row[name]
        self._lead_ins = max(self._lead_ins, row["lead_ins"])
        self._workers.add(row["worker"])
        self._empty += row["empty"]
        self._failed += [(name, why) for name, why in row["failed"]]
        for name in row["ids"]:
            # As hashes, so that millions of documents take little memory.
            digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if digest in self._ids:
                raise ConfigError(
                    f"two documents of the dataset have the id {shown(name)}: the store has one of them. Make ids unique, and run this again; what "
                    "is stored stays."
                )
            self._ids.add(digest)
        if self._progress is not None:
            self._progress(self.summary)


def _check_dataset(dataset: object) -> None:
    if not isinstance(dataset, ray.data.Dataset):
        raise ConfigError(
            f"dataset is {shown(dataset)}, a {type(dataset).__name__}: use a dataset of Ray Data, such as ray.data.read_parquet(...), or "
            "cachetune_ray.read_corpus([...])."
        )


def _place_of(store: object) -> str:
    """A store's URL, or the absolute path of its folder: actors run in folders of their own.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(store, ChunkStore) or not isinstance(store, str | os.PathLike) or not os.fspath(store):
        raise ConfigError(
            f"store is {shown(store)}, a {type(store).__name__}: use a URL such as s3://bucket/prefix, or a folder. Each actor opens it itself."
        )
    return str(store) if is_remote(store) else str(store_path(store))


def _absolute(model: str) -> str:
    """A model's folder as actors find it; a hub id stays as it is."""
    path = Path(model).expanduser()
    return str(path.absolute()) if path.is_dir() else model


def _first_rows(dataset: Any, columns: Columns) -> list[dict[str, Any]]:
    """The first documents, in the dataset's order."""
    first: list[dict[str, Any]] = []
    left = FIRST_CHARACTERS
    for row in _in_order(dataset):
        failures.check(row)
        if row.get("failed") is None:
            columns.check(row)
            left -= sum(len(part) for part in columns.document(row).cut(lambda text: [text]))
            first.append(row)
        if left <= 0:
            break
    return first


def _in_order(dataset: Any) -> Iterator[dict[str, Any]]:
    ordered = dataset.limit(FIRST_CHARACTERS)  # a dataset of its own, whose settings are its own
    ordered.context.execution_options.preserve_order = True
    ordered.context.target_max_block_size = BLOCK_BYTES
    yield from ordered.iter_rows()
