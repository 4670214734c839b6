"""Corpora as datasets: files of all kinds that `cachetune precompute` reads, and Parquet, on this machine or in a bucket."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow
import pyarrow.dataset
import pyarrow.fs
import ray

from cachetune_rag.errors import ConfigError
from cachetune_rag.text.files.corpus import Corpus, CorpusError, SourceFile
from cachetune_rag.text.files.left_out import LeftOut
from cachetune_rag.text.files.readers import SourceDocument, reader_for
from cachetune_ray.documents import SCHEMA, Columns, row_of, tables
from cachetune_ray.failures import told
from cachetune_ray.here import on_this_machine
from cachetune_store.printing import shown

PARQUET = ".parquet"
TASK_BYTES = 32 << 20
"""Bytes of the files that one task reads: many small files, or a single large one."""
TABLE_BYTES = 1 << 20
_SNIFF = 8192


@dataclass(frozen=True)
class FarFile:
    """A file in a bucket, or in a folder that machines share.

    Attributes:
        path: its name in its file system, bucket included.
        id: the id of its document, if it is one document.
        size: its bytes.
        named: whether the file itself was given. Then the run ends if it can't be read.
        filesystem: what opens it.
    """

    path: str
    id: str
    size: int
    named: bool
    filesystem: Any

    def documents(self) -> Iterator[SourceDocument]:
        """Its documents, each read when it is asked for.

        Raises:
            CorpusError: it can't be read. Says why.
        """
        name = PurePosixPath(self.path)
        reader = reader_for(name)
        if reader is None:
            raise CorpusError(f"{name} has an ending that nothing reads: rename it, to .txt for example.")
        if reader.missing:
            raise CorpusError(f"{name} can't be read yet: {reader.needs}.")
        try:
            with io.BufferedReader(self.filesystem.open_input_file(self.path)) as stream:
                reader.check(stream.peek(_SNIFF)[:_SNIFF], Path(name))
                yield from reader.read(stream, self.id, Path(name))
        except OSError as error:
            raise CorpusError(f"{name} can't be read: {error}") from error


@dataclass
class Sources:
    """A corpus that will be read on a cluster.

    Attributes:
        near: files of this machine.
        far: files that all machines reach.
        parquet: URLs or paths of Parquet files or folders of them.
        size: bytes of all files.
        left_out: files that are not read.
    """

    near: list[SourceFile] = field(default_factory=list)
    far: list[FarFile] = field(default_factory=list)
    parquet: list[str] = field(default_factory=list)
    size: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)

    @classmethod
    def scan(cls, paths: Iterable[str | os.PathLike[str]]) -> Sources:
        """Find the files. They are read later, by tasks.

        Args:
            paths: files and folders of this machine, and URLs that pyarrow knows (`s3://bucket/prefix`, `gs://...`, `file:///folder`).

        Raises:
            CorpusError: one is missing or can't be read, or nothing was found.
        """
        listed = [] if isinstance(paths, str | bytes | os.PathLike) else list(paths)
        if not listed:
            raise CorpusError(f"paths is {shown(paths)}: use a list of files, folders and URLs.")
        found = cls()
        local: list[str | os.PathLike[str]] = []
        for path in listed:
            if isinstance(path, str) and "://" in path:
                found._add_url(path)
            elif isinstance(path, str | os.PathLike) and _is_parquet(Path(path)):
                found.parquet.append(str(Path(path).expanduser().absolute()))
                found.size += _bytes_of(Path(path).expanduser())
            else:
                local.append(path)
        if local:
            corpus = Corpus.scan(local)
            # Tasks run in folders of their own.
            found.near = [SourceFile(f.path.absolute(), f.id, f.size, f.reader, f.named) for f in corpus.files]
            found.size += corpus.size
            found.left_out = corpus.left_out
        return found

    def dataset(self) -> Any:
        """The documents as a dataset with the columns of `documents.SCHEMA`."""
        parts = []
        if self.near:
            parts.append(_read_by_tasks(self.near, on_this_machine(f"the corpus {self.near[0].path}")))
        if self.far:
            parts.append(_read_by_tasks(self.far, {}))
        for place in self.parquet:
            parts.append(_read_parquet(place))
        return parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]

    def _add_url(self, url: str) -> None:
        try:
            filesystem, root = pyarrow.fs.FileSystem.from_uri(url)
            info = filesystem.get_file_info(root)
            named = info.type == pyarrow.fs.FileType.File
            files = [info] if named else filesystem.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
        except (OSError, ValueError) as error:
            raise CorpusError(f"{url} can't be read: {error}") from error
        before = len(self.far) + len(self.parquet)
        for file in sorted((f for f in files if f.type == pyarrow.fs.FileType.File), key=lambda f: f.path):
            below = PurePosixPath(file.path).relative_to(root) if not named else PurePosixPath(file.base_name)
            if not named and any(part.startswith(".") for part in below.parts):
                self.left_out.hidden += 1
            elif below.suffix.lower() == PARQUET:
                self.parquet.append(url if named else f"{_without_query(url)}/{below}{_query(url)}")
                self.size += file.size
            elif not named and reader_for(below) is None:
                self.left_out.add_unread(Path(below))
            else:
                self.far.append(FarFile(file.path, below.as_posix(), file.size, named, filesystem))
                self.size += file.size
        if len(self.far) + len(self.parquet) == before:
            raise CorpusError(
                f"no documents below {url}: check it, and its credentials."
                + "".join(f"\n{line}" for line in self.left_out.lines())
            )


def read_corpus(paths: Iterable[str | os.PathLike[str]]) -> Any:
    """A dataset of documents: files of text, Markdown, JSONL, CSV, HTML, PDF and Parquet, and folders of them.

    A file is a document, named by its path below the folder that was given; in JSONL, CSV and Parquet every row is one.

    Args:
        paths: files and folders of this machine, which are then read on it, or URLs (`s3://bucket/prefix`, `file:///shared/folder`), which are read on all
            machines.

    Raises:
        CorpusError: one is missing or can't be read, or nothing was found.
    """
    return Sources.scan(paths).dataset()


def _read_by_tasks(files: Sequence[SourceFile | FarFile], options: dict[str, Any]) -> Any:
    """A dataset of the documents of files. Each task reads a single large file or several small ones, and hands on what it has read so far."""
    groups: list[dict[str, Any]] = []
    held: list[SourceFile | FarFile] = []
    size = 0
    for file in files:
        held.append(file)
        size += file.size
        if size >= TASK_BYTES:
            groups.append({"files": held})
            held, size = [], 0
    if held:
        groups.append({"files": held})
    return ray.data.from_items(groups, override_num_blocks=len(groups)).map_batches(
        _read_group, batch_size=1, batch_format="numpy", zero_copy_batch=True, **options
    )


def _read_group(batch: dict[str, Any]) -> Iterator[Any]:
    for files in batch["files"]:
        yield from tables(_rows(files), SCHEMA, TABLE_BYTES)


def _rows(files: Iterable[SourceFile | FarFile]) -> Iterator[dict[str, Any]]:
    """A row for each document, and one for each file of a folder that can't be read to its end."""
    left_out = LeftOut()
    for file in files:
        given = 0
        try:
            documents = Corpus([], left_out).read(file) if isinstance(file, SourceFile) else file.documents()
            for document in documents:
                given += document.size
                yield row_of(document)
        except CorpusError as error:
            if file.named:
                yield {"size": 0, "error": told(error)}
                return
            left_out.failed.append((Path(file.id), str(error)))
        for path, reason in left_out.failed:
            yield {"id": str(path), "failed": reason, "size": max(0, file.size - given)}
        left_out.failed.clear()


def _read_parquet(place: str) -> Any:
    columns = Columns()
    filesystem, path = pyarrow.fs.FileSystem.from_uri(place)
    near = {} if "://" in place else on_this_machine(f"the corpus {place}")
    footers = pyarrow.dataset.dataset(path, filesystem=filesystem, format="parquet")
    columns.check(footers.schema.names)
    used = [name for name in (columns.id, columns.text, columns.chunks) if name in footers.schema.names]
    each = sum(filesystem.get_file_info(file).size for file in footers.files) // max(1, footers.count_rows())
    dataset = ray.data.read_parquet(path, filesystem=filesystem, columns=used, **near)

    def rows(table: Any) -> Any:
        return pyarrow.Table.from_pylist([_checked({**row, "size": each}) for row in table.to_pylist()], schema=SCHEMA)

    return dataset.map_batches(rows, batch_format="pyarrow", **near)


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `SCHEMA` for one of a table, whose columns may have any type; the error, if it is no document."""
    try:
        return row_of(Columns().document(row))
    except ConfigError as error:
        return {"size": 0, "error": told(error)}


def _is_parquet(path: Path) -> bool:
    """Whether a path of this machine is a Parquet file, or a folder with nothing else that is read."""
    path = path.expanduser()
    if path.is_dir():
        kinds = {f.suffix.lower() for f in path.rglob("*") if f.is_file() and not f.name.startswith((".", "_"))}
        return kinds == {PARQUET}
    return path.suffix.lower() == PARQUET


def _bytes_of(path: Path) -> int:
    files = path.rglob(f"*{PARQUET}") if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files)


def _without_query(url: str) -> str:
    return url.partition("?")[0].rstrip("/")


def _query(url: str) -> str:
    return "".join(url.partition("?")[1:])
