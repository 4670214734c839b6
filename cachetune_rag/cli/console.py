"""Printing for all commands: errors without tracebacks, JSON, and amounts in words."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment
from rich.text import Text

from cachetune_rag.checking.escaping import visible, visible_line
from cachetune_rag.cli.interrupts import line_for, status_for
from cachetune_rag.cli.output import OutputError
from cachetune_rag.errors import CacheTuneError
from cachetune_store.printing import plural

DEBUG_VARIABLE = "CACHETUNE_DEBUG"
ERROR = 2

_P = ParamSpec("_P")


class UsageError(CacheTuneError):
    """A command can't be done as it was given. The message says why, and what to do."""


class _Visible:
    """Something to print, with harmful characters of its text written as escapes. Colours and line ends stay."""

    def __init__(self, inner: ConsoleRenderable):
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._inner, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


class _Escaping(RenderHook):
    """Keeps text that a terminal would take for a command off a console."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Visible(each) for each in renderables]


def stderr() -> Console:
    """The console for everything that is not the result. Lines are wrapped on a terminal only."""
    return _console(sys.stderr.isatty(), stderr=True)


def stdout() -> Console:
    """The console for results."""
    return _console(sys.stdout.isatty())


def _console(terminal: bool, *, stderr: bool = False) -> Console:
    # Without markup and emoji, because ids and messages may contain texts such as [red] and :cat:.
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=not terminal)
    console.push_render_hook(_Escaping())
    return console


def note(message: str) -> None:
    """Print a line on stderr."""
    stderr().print(Text(message, style="dim"))


def emit_json(result: dict[str, Any]) -> None:
    """Print the result as one JSON document on stdout. Infinite numbers and NaN become null, because JSON can't hold them."""
    sys.stdout.write(json.dumps(_finite(result), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printable(text: str) -> str:
    """A model's text for stdout. For a terminal, control characters are written as escapes, because they could rewrite the screen."""
    return visible(text.replace("\r", "")) if sys.stdout.isatty() else text


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Print warnings of the engine and the store like those of `note`, because they also contain ids and paths."""
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
        except KeyboardInterrupt as error:
            _flush()
            stderr().print(f"\n{line_for(error)}.", style="yellow")
            raise typer.Exit(status_for(error)) from None
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
    """Print the line on stderr that says what went wrong."""
    stderr().print(Text.assemble(("Error: ", "bold red"), _message(error)))


def _is_exit(error: Exception) -> bool:
    """Whether typer raised the error, to end the command or to refuse it. Its classes move between releases, so a field is checked too."""
    return isinstance(error, typer.Exit | typer.Abort) or hasattr(error, "exit_code")


def _flush() -> None:
    """Print the beginning of an answer before the error that ended it. A failure to do so must not hide that error."""
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
    """Whether the store raised the error. The store (and torch) is not imported to find out."""
    errors = sys.modules.get("cachetune_store.errors")
    return errors is not None and isinstance(error, errors.StoreError)


def size(count: int) -> str:
    """Bytes in a unit that people can read."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def number(count: int, word: str) -> str:
    """A count with its word: "1 chunk", "1,200 chunks"."""
    return f"{count:,} {plural(word, count)}"
