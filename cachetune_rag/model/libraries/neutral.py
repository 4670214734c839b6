"""Settings of torch that an engine needs, whatever the caller has set for its thread.

Autocast, inference mode, gradients and a default device are settings of a thread. An engine's results must not depend on them, and the
tensors that it keeps must be ordinary ones. The default dtype belongs to the whole process, so changing it here would change it for the
caller's other threads. Therefore this package names a dtype wherever it makes a tensor.
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

    It applies to its thread, so it must not stay open while the caller's code runs, for example between two pieces of a stream.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            # As a context it overrides the caller's default. It slows every call of torch, so it is only entered if necessary.
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.no_grad())
        yield


def each_neutrally(items: Iterator[_T]) -> Iterator[_T]:
    """The same items, each made inside `neutral`. Between two items the caller's settings apply."""
    while True:
        with neutral():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def neutrally(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, called inside `neutral`."""

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with neutral():
            return function(*args, **kwargs)

    return run
