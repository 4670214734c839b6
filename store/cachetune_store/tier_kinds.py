"""The kinds of tiers and what is true of each, in one list, the fastest first. No torch is imported, so that a command line starts
quickly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DEVICE", "DISK", "HOST", "KINDS", "NAMES", "REMOTE", "TierKind", "kind_of", "rank"]


@dataclass(frozen=True)
class TierKind:
    """What is true of every tier of one kind.

    Attributes:
        name: its name in reports, statistics and options.
        in_memory: rows can be used without waiting for a file.
        lasting: chunks are still there after the process has ended.
        shared_by: who sees the same chunks: the "threads" of one process, the "processes" of one machine, or many "machines".
        copies: it only holds copies of chunks that a slower tier has as well.
        blocks: whole blocks of rows are read, so ratios that need the same blocks take the same time.
    """

    name: str
    in_memory: bool
    lasting: bool
    shared_by: Literal["threads", "processes", "machines"]
    copies: bool = False
    blocks: bool = False


DEVICE = TierKind("device", in_memory=True, lasting=False, shared_by="threads", copies=True)
HOST = TierKind("host", in_memory=True, lasting=False, shared_by="threads")
DISK = TierKind("disk", in_memory=False, lasting=True, shared_by="processes", blocks=True)
REMOTE = TierKind("remote", in_memory=False, lasting=True, shared_by="machines", blocks=True)

KINDS = (DEVICE, HOST, DISK, REMOTE)
"""All kinds, the fastest first."""
NAMES = tuple(kind.name for kind in KINDS)


def kind_of(name: str) -> TierKind:
    """The kind of this name.

    Raises:
        KeyError: there is none.
    """
    for kind in KINDS:
        if kind.name == name:
            return kind
    raise KeyError(f"there is no tier {name!r}: use {', '.join(map(repr, NAMES))}")


def rank(name: str) -> int:
    """The place of a tier in `KINDS`: 0 is the fastest. A name that isn't there counts as slower than all of them."""
    return NAMES.index(name) if name in NAMES else len(NAMES)
