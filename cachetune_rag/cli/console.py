"""What all commands share on the terminal: errors without tracebacks, JSON, and the words for amounts."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment
from rich.text import Text

from cachetune_rag.checking.escaping import visible, visible_line
from cachetune_rag.cli.output import OutputError
from cachetune_rag.errors import CacheTuneError

DEBUG_VARIABLE = "CACHETUNE_DEBUG"
ERROR, INTERRUPTED = 2, 130

_P = ParamSpec("_P")


class UsageError(CacheTuneError):
    """What was asked for can't be done; the message says why and what to do."""


class _Visible:
    """Something to print, with the harmful characters of its text spelt out; colours and line ends stay."""

    def __init__(self, inner: ConsoleRenderable):
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._inner, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


class _Escaping(RenderHook):
    """Keeps what a terminal would take for a command off a console."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Visible(each) for each in renderables]


def stderr() -> Console:
    """The console for everything that is not the result. Lines are wrapped on a terminal only."""
    return _console(sys.stderr.isatty(), stderr=True)


def stdout() -> Console:
    """The console for results."""
    return _console(sys.stdout.isatty())


def _console(terminal: bool, *, stderr: bool = False) -> Console:
    # Neither markup nor emoji: what is printed holds ids and messages, in which [red] and :cat: mean themselves.
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=not terminal)
    console.push_render_hook(_Escaping())
    return console


def note(message: str) -> None:
    """A line on stderr."""
    stderr().print(Text(message, style="dim"))


def emit_json(result: dict[str, Any]) -> None:
    """The result as the one JSON document on stdout. A figure that is no finite number is null, as JSON has no word for it."""
    sys.stdout.write(json.dumps(_finite(result), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printable(text: str) -> str:
    """A model's text for stdout: on a terminal with control characters spelt out, which could restyle or rewrite it."""
    return visible(text.replace("\r", "")) if sys.stdout.isatty() else text


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Warnings of the engine and the store become lines like those of `note`; they hold ids and paths, too."""
    handler = _LineHandler(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("cachetune_rag", "cachetune_store")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


class _LineHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            note(f"Warning: {record.getMessage()}")
        except Exception:
            self.handleError(record)


def guarded(command: Callable[_P, None]) -> Callable[_P, None]:
    """Turn a command's errors into a line on stderr and an exit status.

    The command's parameter `debug`, or the environment variable CACHETUNE_DEBUG, adds the traceback.
    """

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            _flush()
            stderr().print("\nInterrupted.", style="yellow")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise
        except Exception as error:
            if _is_exit(error):
                raise
            _flush()
            if kwargs.get("debug") or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"):
                stderr().print(traceback.format_exc(), soft_wrap=True)
            print_error(error)
            raise typer.Exit(ERROR) from None

    return run


def print_error(error: Exception) -> None:
    """The line on stderr that says what went wrong."""
    stderr().print(Text.assemble(("Error: ", "bold red"), _message(error)))


@contextmanager
def instant_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process at once, for stretches in which there is nothing to keep.

    While torch and transformers are imported, a KeyboardInterrupt may surface as some other error, or not at all.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(*_: object) -> None:
    os.write(2, b"\nInterrupted.\n")
    os._exit(INTERRUPTED)


def _is_exit(error: Exception) -> bool:
    """Whether typer itself raised it, to end or to refuse (the classes move between releases, their fields don't)."""
    return isinstance(error, typer.Exit | typer.Abort) or hasattr(error, "exit_code")


def _flush() -> None:
    """What was printed of an answer stands before the error that ended it; that it can't be written must not hide that error."""
    with suppress(OutputError):
        sys.stdout.flush()


def _message(error: Exception) -> str:
    if isinstance(error, CacheTuneError) or _from_store(error):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{visible_line(error.filename)}: {error.strerror}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: use a smaller model, fewer or smaller chunks, or a smaller --host-budget. ({error})"
    return f"unexpected {type(error).__name__}: {error} (--debug shows where)"


def _from_store(error: Exception) -> bool:
    """Whether the store raised it, found out without importing the store (and torch) for a mistyped path."""
    errors = sys.modules.get("cachetune_store.errors")
    return errors is not None and isinstance(error, errors.StoreError)


def size(count: int) -> str:
    """Bytes, as people read them."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def number(count: int, word: str) -> str:
    """A count with its word: "1 chunk", "1,200 chunks"."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"
