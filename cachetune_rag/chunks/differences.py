"""Why chunks of one namespace can't be used where another one is wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from cachetune_store import Namespace  # the command line imports this module before it knows that it needs numpy


def what_differs(stored: Namespace, wanted: Namespace) -> Literal["model", "tokenizer", "dtype", "lead-ins"]:
    """The first thing to mend, so that chunks like the stored ones are found.

    A model's fingerprint depends on its dtype, so it says something about the weights only if the dtype is the same.
    """
    if stored.model != wanted.model and stored.dtype == wanted.dtype:
        return "model"
    if stored.tokenizer != wanted.tokenizer:
        return "tokenizer"
    return "dtype" if stored.dtype != wanted.dtype else "lead-ins"
