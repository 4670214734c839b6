"""Plots of measurements, by matplotlib (the extra `plot`)."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cachetune_rag.cli.console import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png", ".pdf")


def check_plot(path: Path) -> None:
    """Refuse a plot that couldn't be written, before anything is measured.

    Raises:
        UsageError: an unknown kind of file, a missing folder, or no matplotlib.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path} has no known ending: use {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    if not path.parent.is_dir() or path.is_dir():
        raise UsageError(f"--plot {path} can't be written: name a file in a folder that exists.")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'cachetune-rag[plot]', or leave --plot out.") from None


def save_plot(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.lower().removeprefix("."))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(drawn.getvalue())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
