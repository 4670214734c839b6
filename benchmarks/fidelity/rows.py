"""Results as JSON lines. They are written row by row, so that a run that was cut off can be continued."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEY = ("set", "record", "digest", "lead_in", "codec", "selector", "ratio", "budget")
"""What tells one row from another."""

Row = dict[str, Any]
Key = tuple[Any, ...]


def key_of(row: Row) -> Key:
    """What a row measures."""
    return tuple(row[name] for name in KEY)


class RowFile:
    """The rows of one process. Several processes (shards) may write to a folder, each to a file of its own.

    Args:
        folder: where the file is. It is made if there is none.
        shard, shards: which part of the records this process takes.
        header: what all rows have in common, the first line of every file. A folder with another header is refused.

    Raises:
        ValueError: the folder holds results of other settings.
    """

    def __init__(self, folder: Path, shard: int, shards: int, header: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rows-{shard}of{shards}.jsonl"
        self.known: dict[Key, Row] = {}
        for path in row_files(folder):
            first, rows = read_rows(path)
            if first is not None:
                _check(path, first, header)
            self.known.update((key_of(row), row) for row in rows)
        whole = _whole_lines(self.path)
        self._file = self.path.open("r+" if self.path.exists() else "w", encoding="utf-8")
        self._file.truncate(whole)  # a line that was cut off by a kill
        self._file.seek(whole)
        if not whole:
            self._write({"header": header})

    def add(self, row: Row) -> None:
        """Keep a row. It is on disk when this returns."""
        self.known[key_of(row)] = row
        self._write(row)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def row_files(folder: Path) -> list[Path]:
    """Files of rows in a folder, plain or gzipped."""
    return sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")])


def read_rows(path: Path) -> tuple[dict[str, Any] | None, list[Row]]:
    """Header and rows of a file. An incomplete last line, which is being written or was cut off, is left out."""
    header, rows = None, []
    for line in _lines(path):
        found = json.loads(line)
        if "header" in found:
            header = found["header"]
        else:
            rows.append(found)
    return header, rows


def _lines(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield line


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last complete line."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def _check(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    other = [n for n in {**found, **wanted} if n != "environment" and found.get(n) != wanted.get(n)]
    if other:
        what = "; ".join(f"{n} is {found.get(n)!r} there and {wanted.get(n)!r} now" for n in other)
        raise ValueError(f"{path} holds results of other settings ({what}): use another --out, or delete that folder.")
