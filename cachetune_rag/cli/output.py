"""Writing results to standard output. A full disk or a closed stream ends a command with an error message, so that an incomplete
result never goes unnoticed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from cachetune_rag.errors import CacheTuneError

__all__ = ["OutputError", "give_up", "open_missing_streams", "results_on_stdout"]


class OutputError(CacheTuneError):
    """The result can't be written where it was to go."""


class _Results:
    """Standard output whose errors can be told apart from those of files that a command reads and writes: they are `OutputError`s.

    Args:
        inner: the stream.
    """

    def __init__(self, inner: TextIO):
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def write(self, text: str) -> int:
        with self._told():
            return self._inner.write(text)

    def flush(self) -> None:
        with self._told():
            self._inner.flush()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise  # the reader has seen enough, which is no error of ours
        except OSError as error:
            give_up(self._inner)
            raise OutputError(
                f"the result can't be written to standard output ({error.strerror}): send it to a file or a program that takes it. "
                "What the command did in the store stays."
            ) from error


def give_up(stream: TextIO) -> None:
    """Redirect a broken stream to /dev/null, so that writing its buffered rest doesn't fail again when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def results_on_stdout() -> Iterator[None]:
    """While open, errors of standard output are raised as `OutputError`; at the end, everything that was printed has been written.

    Raises:
        OutputError: standard output is closed, or doesn't take it.
    """
    stream = sys.stdout
    if stream is None:
        raise OutputError(
            "standard output is closed, so the result has nowhere to go: send it to a file, or to /dev/null if you don't want it."
        )
    results: Any = _Results(stream)
    sys.stdout = results
    try:
        try:
            yield
        finally:
            results.flush()
    finally:
        sys.stdout = stream


def open_missing_streams() -> None:
    """Open each of the three standard streams that the caller has closed as /dev/null.

    Otherwise a file of the store could get the file descriptor of such a stream, and libraries that print would write into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for as long as the process lives
