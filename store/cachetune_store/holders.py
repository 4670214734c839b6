"""Which processes hold a lock on a file. Only Linux says so, and only of processes that this one may look at."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Holders", "holders_of", "holders_of_bytes"]

_MOST_NAMED = 4


@dataclass(frozen=True)
class Holders:
    """Other processes that hold a lock. `str()` names them.

    Attributes:
        pids: their ids; empty if the system doesn't say who it is, or if it is another thread of this process.
        stopped: those of them that are stopped (Ctrl-Z, a debugger), and so won't let go of it.
    """

    pids: tuple[int, ...] = ()
    stopped: tuple[int, ...] = ()

    def __str__(self) -> str:
        if not self.pids:
            return "another process, or another thread of this one"
        parts = []
        for pid in self.pids[:_MOST_NAMED]:
            command = _command(pid)
            parts.append(
                f"process {pid}" + (f" ({command!r})" if command else "") + (", stopped" if pid in self.stopped else "")
            )
        return "; ".join(parts)


def holders_of(path: Path) -> Holders:
    """Who has the file `path` locked, as a whole."""
    place = _place(path)
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return Holders()
    rows = [fields for fields in map(str.split, lines) if len(fields) == 8 and fields[5] == place]  # waiters have "->"
    return _others(int(fields[4]) for fields in rows)


def holders_of_bytes(path: Path, places: Collection[int]) -> Holders:
    """Who has one of these bytes of the file `path` locked by a lock of an open file.

    Such a lock has no process in /proc/locks, so the descriptors of all processes are looked through.
    """
    place = _place(path)
    if not place:
        return Holders()
    return _others(pid for pid in _processes() if any(byte in places for byte in _locked_bytes(pid, place)))


def _others(pids: Iterator[int]) -> Holders:
    found = tuple(pid for pid in dict.fromkeys(pids) if pid > 0 and pid != os.getpid())
    return Holders(found, tuple(pid for pid in found if _state(pid) in ("T", "t")))


def _place(path: Path) -> str:
    """The file, as /proc names it in locks; "" if it is gone."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"


def _processes() -> Iterator[int]:
    try:
        yield from (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    except OSError:
        return


def _locked_bytes(pid: int, place: str) -> Iterator[int]:
    """Bytes of a file that a process has locked one by one."""
    try:
        descriptors = list(Path(f"/proc/{pid}/fdinfo").iterdir())
    except OSError:
        return  # it has ended, or is another user's
    for descriptor in descriptors:
        try:
            content = descriptor.read_text()
        except OSError:
            continue
        for line in content.splitlines():
            # lock:  1: OFDLCK  ADVISORY  WRITE -1 fe:00:1234 FIRST LAST
            fields = line.split()
            if len(fields) == 9 and fields[0] == "lock:" and fields[2] == "OFDLCK" and fields[6] == place:
                yield int(fields[7])


def _state(pid: int) -> str:
    """A process's state: "T" or "t" if it is stopped; "" if the system doesn't say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()[:80].replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
