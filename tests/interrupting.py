"""Ctrl-C at a chosen line of a file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any


def interrupted_at(step: int, module: ModuleType, work: Callable[[], object]) -> BaseException | None:
    """What `work` raises if KeyboardInterrupt comes before line number `step` of the module's file that it comes to; None if it ends."""
    left = step

    def trace(frame: FrameType, event: str, _value: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        work()
    except BaseException as error:
        return error.with_traceback(None)
    finally:
        sys.settrace(None)
    return None
