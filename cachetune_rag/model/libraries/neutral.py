"""Torch as an engine needs it, whatever the caller has set for the thread it calls from.

Autocast, inference mode, gradients and a default device are settings of a thread; an engine's numbers must not depend on them, and
what it keeps between requests must be ordinary tensors. The default dtype is one for the whole process, so it can't be changed here
without changing it for the caller's other threads: this package names a dtype wherever it makes a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")
_T = TypeVar("_T")


@contextmanager
def neutral() -> Iterator[None]:
    """While the context is open: no gradients, no inference mode, no autocast, tensors are made on the CPU by default.

    It belongs to its thread, so it mustn't be left open where the caller's code goes on (between two pieces of a stream, say).
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            # As a context: it outranks the caller's default, and slows every call of torch's, so it is only entered where needed.
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.no_grad())
        yield


def each_neutrally(items: Iterator[_T]) -> Iterator[_T]:
    """The same items, each made inside of `neutral`; between two of them the caller's settings hold."""
    while True:
        with neutral():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def neutrally(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, run inside of `neutral`."""

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with neutral():
            return function(*args, **kwargs)

    return run
