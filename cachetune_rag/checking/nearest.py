"""What an error says about a name that doesn't exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from cachetune_store.printing import shown


def hint(name: str, known: Iterable[str], otherwise: str, cutoff: float = 0.6) -> str:
    """A question after the nearest known name; `otherwise` where none is near.

    Args:
        name: what was given.
        known: all names that there are.
        otherwise: what to say where it is no typing error.
        cutoff: how alike two names have to be, from 0 to 1, as for `difflib.get_close_matches`.
    """
    near = difflib.get_close_matches(name, sorted(known), 1, cutoff)
    return f"did you mean {shown(near[0])}?" if near else otherwise
