"""Options that several commands take, so that they are spelt and explained alike."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

_MODEL, _STORE = "Model", "Store"


def expanded(path: Path | None) -> Path | None:
    """A path whose leading ~ is the home folder: shells leave it as it is behind `--store=`, and in quotes."""
    if path is not None:
        with contextlib.suppress(RuntimeError):  # there is no such user: ~ is then part of the name
            return path.expanduser()
    return path


Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="PATH_OR_ID", help="Folder of the model, or its hub id.", rich_help_panel=_MODEL
    ),
]
GgufFile = Annotated[
    str | None,
    typer.Option(
        "--gguf-file",
        metavar="NAME",
        help="Name of a GGUF file in that folder; its weights are dequantised.",
        rich_help_panel=_MODEL,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="auto, float32, bfloat16 or float16. auto: the model's own on a GPU, float32 on a CPU.",
        rich_help_panel=_MODEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="NAME", help="auto (a GPU if there is one), cpu, cuda or cuda:N.", rich_help_panel=_MODEL
    ),
]
Store = Annotated[
    Path,
    typer.Option(
        "--store",
        "-s",
        metavar="FOLDER",
        help="Folder of the KV store.",
        callback=expanded,
        rich_help_panel=_STORE,
    ),
]
Tenant = Annotated[
    str,
    typer.Option(
        "--tenant",
        metavar="NAME",
        help="Whose documents and chunks; those of others are never used. Left out: those stored without a tenant.",
        show_default=False,
        rich_help_panel=_STORE,
    ),
]
Codec = Annotated[
    str,
    typer.Option(
        "--codec",
        metavar="NAME",
        help="How new chunks are stored: exact; int8 or fp8 (half the bytes of 16-bit numbers, int8 being nearly exact); "
        "int4 (a bit more than a quarter, coarser).",
        rich_help_panel=_STORE,
    ),
]
HostBudget = Annotated[
    str,
    typer.Option(
        "--host-budget",
        metavar="BYTES",
        help="Memory that keeps chunks at hand, such as 4GiB or 500MB.",
        rich_help_panel=_STORE,
    ),
]
DeviceBudget = Annotated[
    str,
    typer.Option(
        "--device-budget",
        metavar="BYTES",
        help="Memory of the GPU that keeps chunks in use at hand, beside the model; 0: none.",
        rich_help_panel=_STORE,
    ),
]
DiskBudget = Annotated[
    str,
    typer.Option(
        "--disk-budget",
        metavar="BYTES",
        help="Most bytes of the store; the chunks used longest ago make room.",
        rich_help_panel=_STORE,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

HOST_BUDGET, DISK_BUDGET = "4GiB", "64GiB"
