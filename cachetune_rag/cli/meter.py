"""Shows how far long work is: by a line that changes on a terminal, and by a new line every ten seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from cachetune_rag.cli.console import note, stderr

LINE_SECONDS = 10.0
ESTIMATE_SECONDS = 30.0
"""The remaining time is estimated from the work of so many seconds."""


class Meter:
    """Shows progress while it is open as a context manager.

    Args:
        title: what is being done.
        countable: whether the amount of work is known. A bar then shows the share that is done.
    """

    def __init__(self, title: str, *, countable: bool = True):
        self._countable = countable
        self._last_line = time.monotonic()
        console = stderr()
        self._progress: Progress | None = None
        if console.is_terminal:
            detail = TextColumn("{task.fields[detail]}", markup=False)
            columns = (
                (
                    TextColumn(title),
                    BarColumn(bar_width=None),
                    TaskProgressColumn(),
                    detail,
                    TimeRemainingColumn(compact=True),
                )
                if countable
                else (SpinnerColumn(), detail)
            )
            self._progress = Progress(
                *columns, console=console, expand=countable, speed_estimate_period=ESTIMATE_SECONDS
            )
            self._task = self._progress.add_task("", total=None, detail="" if countable else title)

    def update(self, detail: str, done: float = 0, total: float = 1, *, line: str | None = None) -> None:
        """Show where the work is.

        Args:
            detail: the text beside the bar.
            done, total: how much is done, and how much there is, if the work is countable.
            line: the text if there is no terminal; None: `detail`.
        """
        if self._progress is not None:
            if self._countable:
                self._progress.update(self._task, completed=done, total=total, detail=detail)
            else:
                self._progress.update(self._task, detail=detail)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            share = f"{100 * done / total:3.0f}%  " if self._countable else ""
            note(share + (detail if line is None else line))

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
