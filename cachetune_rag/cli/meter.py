"""How far a precompute job is: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from cachetune_rag.cli.console import note, number, size, stderr

if TYPE_CHECKING:
    from cachetune_rag.chunks.precompute import Progress as JobProgress

_LINE_SECONDS = 10.0
_WINDOW_SECONDS = 30.0


class Meter:
    """Progress through the bytes of a corpus; inside a document, through its chunks. A context manager.

    Args:
        total: bytes of the corpus.
    """

    def __init__(self, total: int):
        self._total = total
        self._read = self._finished = 0  # bytes and number of finished documents
        self._due: deque[tuple[int, int]] = (
            deque()
        )  # bytes and chunks of those read and not finished: the job reads ahead
        self._before = 0  # chunks done before the document at hand
        self._inside = 0.0  # bytes of it that are done
        self._samples: deque[tuple[float, int]] = deque([(0.0, 0)])
        self._spoke = time.monotonic()
        console = stderr()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("Precomputing"),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TextColumn("{task.fields[detail]}"),
                TimeRemainingColumn(compact=True),
                console=console,
                expand=True,
                speed_estimate_period=_WINDOW_SECONDS,
            )
            self._task = self._bar.add_task("", total=max(total, 1), detail="")

    @property
    def percent(self) -> float:
        """Share of the corpus that is done, in percent."""
        return 100 * min(1.0, (self._read + self._inside) / max(self._total, 1))

    def begin(self, size: int, chunks: int) -> None:
        """A document of so many bytes and chunks was handed to the job, which takes them in order."""
        self._due.append((size, chunks))

    def skip(self, size: int) -> None:
        """Bytes that need no work."""
        self._read += size

    def update(self, progress: JobProgress) -> None:
        """Show where the job is."""
        done = progress.chunks + progress.skipped
        while self._finished < progress.documents:
            self._finished += 1
            self._before = done
            self.skip(self._due.popleft()[0])
        bytes_, chunks = self._due[0] if self._due else (0, 1)
        self._inside = bytes_ * min(1.0, (done - self._before) / max(chunks, 1))
        if self._bar is not None:
            detail = f"{number(progress.documents, 'doc')} · {self._rate(progress):,.0f} tok/s · {size(progress.bytes)}"
            self._bar.update(self._task, completed=self.percent / 100 * max(self._total, 1), detail=detail)
        elif time.monotonic() - self._spoke >= _LINE_SECONDS:
            self._spoke = time.monotonic()
            note(
                f"{self.percent:3.0f}%  {number(progress.documents, 'document')}, {self._rate(progress):,.0f} tokens/s, "
                f"{size(progress.bytes)} stored"
            )

    def _rate(self, progress: JobProgress) -> float:
        """Tokens a second over the last half minute."""
        self._samples.append((progress.seconds, progress.tokens))
        while len(self._samples) > 2 and self._samples[0][0] < progress.seconds - _WINDOW_SECONDS:
            self._samples.popleft()
        (start, before), (end, after) = self._samples[0], self._samples[-1]
        return (after - before) / (end - start) if end > start else 0.0

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
