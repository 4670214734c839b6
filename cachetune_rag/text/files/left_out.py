"""What a run over files left out. It is reported at the end of the run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from cachetune_rag.checking.escaping import visible_line
from cachetune_rag.text.files.readers import Reader

_NAMED = 10
"""Most files that are named in the text for people. The JSON has all of them."""
_LONGEST_SUFFIX = 12


class LeftOut:
    """Counts of files without a reader, and the files that could not be read, each with the reason."""

    def __init__(self) -> None:
        self.unread: Counter[str] = Counter()
        """Number of files without a reader, by ending."""
        self.needing: dict[str, Counter[str]] = {}
        """Number of files whose reader needs a package that isn't installed, by what to do about it, and by ending."""
        self.hidden = 0
        self.linked_folders = 0
        self.failed: list[tuple[Path, str]] = []

    def add_unread(self, path: Path) -> None:
        """Count a file that has no reader."""
        self.unread[_kind(path)] += 1

    def add_needing(self, path: Path, reader: Reader) -> None:
        """Count a file whose reader lacks a package."""
        self.needing.setdefault(reader.needs, Counter())[_kind(path)] += 1

    def needs(self) -> list[str]:
        """A line for each kind of file that can't be read before something is installed."""
        return [f"Left out {_count(kinds)}: {needs}, then run this again." for needs, kinds in self.needing.items()]

    def lines(self) -> list[str]:
        """All of it in words; no lines if nothing was left out."""
        told = [*self.needs()]
        if self.unread:
            told.append(f"Left out, as nothing reads them: {_count(self.unread)}.")
        passed = [_amount(self.hidden, "hidden file or folder", "hidden files or folders")] if self.hidden else []
        if self.linked_folders:
            passed.append(_amount(self.linked_folders, "link to a folder", "links to folders"))
        if passed:
            told.append(f"Left out {' and '.join(passed)}.")
        told += [f"Left out: {reason}" for _, reason in self.failed[:_NAMED]]
        if more := self.failed[_NAMED:]:
            kinds = Counter(_kind(path) for path, _ in more)
            told.append(f"Left out, as they can't be read either: {_count(kinds)}; --json names them all.")
        return told

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        needing = Counter[str]()
        for kinds in self.needing.values():
            needing.update(kinds)
        return {
            "unread": dict(self.unread),
            "needing_packages": dict(needing),
            "hidden": self.hidden,
            "linked_folders": self.linked_folders,
            "failed": [{"path": str(path), "reason": reason} for path, reason in self.failed],
        }


def _kind(path: Path) -> str:
    """A file's ending, unless it is long or has blanks, so that it looks like part of a sentence."""
    suffix = path.suffix.lower()
    return suffix if len(suffix) <= _LONGEST_SUFFIX and " " not in suffix else "with other endings"


def _count(kinds: Counter[str]) -> str:
    return ", ".join(f"{n:,} {visible_line(suffix) or 'without an ending'}" for suffix, n in kinds.most_common())


def _amount(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"
