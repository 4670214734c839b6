"""Options that several commands share. Those that are also options of the engine are declared in `cachetune_rag/options.py`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from cachetune_rag.options import command_line_option, declared
from cachetune_rag.selection import names

_MODEL, _STORE = "Model", "Store"

DEFAULT_TOP_K = 4
"""Passages that a question is answered from, where the user says nothing."""


def ratio_of(given: str) -> float | str:
    """A ratio as the user wrote it. "auto" stays; anything else that is no number is refused later, together with other unusable values."""
    try:
        return float(given)
    except ValueError:
        return given


def path_of(given: str) -> Path:
    """The path that an argument names; a leading ~ is the home folder: shells leave it as it is behind `--store=`, and in quotes.

    Raises:
        typer.BadParameter: it is empty, which would be taken for the current folder.
    """
    if not given:
        raise typer.BadParameter(
            "the path is empty (a variable that isn't set, perhaps): name one, or . for this folder."
        )
    path = Path(given)
    with contextlib.suppress(RuntimeError):  # there is no such user: ~ is then part of the name
        return path.expanduser()
    return path


def path_or_url(given: str) -> Path | str:
    """The same, or a URL as it stands."""
    return given if "://" in given else path_of(given)


def _declared(name: str, *, show_default: bool = True) -> Any:
    """The command-line option for the engine's option of this name."""
    found = command_line_option(name)
    return typer.Option(
        found.flag, metavar=found.metavar, help=found.help, show_default=show_default, rich_help_panel=_STORE
    )


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
        parser=path_of,
        rich_help_panel=_STORE,
    ),
]
StoreOrUrl = Annotated[
    Any,
    typer.Option(
        "--store",
        "-s",
        metavar="FOLDER",
        help="Folder of the KV store.",
        parser=path_or_url,
        rich_help_panel=_STORE,
    ),
]
Tenant = Annotated[str, _declared("tenant", show_default=False)]
Codec = Annotated[str, _declared("codec")]
HostBudget = Annotated[str, _declared("host_budget")]
DeviceBudget = Annotated[str, _declared("device_budget")]
DiskBudget = Annotated[str, _declared("disk_budget")]
Remote = Annotated[str | None, _declared("remote", show_default=False)]
RemoteCodec = Annotated[str | None, _declared("remote_codec", show_default=False)]
StoreKey = Annotated[str | None, _declared("store_key", show_default=False)]
Encrypt = Annotated[bool, _declared("encrypt", show_default=False)]
TopK = Annotated[int, typer.Option("--top-k", "-k", min=1, help="Passages to retrieve for a question without chunks.")]
RatioSelector = Annotated[str, typer.Option("--selector", metavar="NAME", help=f"Whose ratio: {names.HELP}.")]
FromDocuments = Annotated[
    list[str] | None,
    typer.Option("--document", "-d", metavar="ID", help="Answer from this whole document. May be repeated."),
]
ChunkFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--chunk-file", metavar="FILE", help="Use this file (text, HTML, PDF, CSV) as one passage. May be repeated."
    ),
]
Best = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        "-k",
        min=1,
        help="Answer from the stored passages that share most with the question, at most so many; with -d, from "
        f"those documents' only. {DEFAULT_TOP_K} if neither documents nor files are named.",
        show_default=False,
    ),
]
Ratio = Annotated[
    str, typer.Option("--ratio", "-r", metavar="R", help="Share of passage tokens to recompute, 0 to 1, or auto.")
]
RequestSelector = Annotated[
    str,
    typer.Option("--selector", metavar="NAME", help=f"What chooses those tokens: {names.HELP}."),
]
MaxKL = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        metavar="X",
        help="Recompute as little as is predicted to keep the first token's KL from full prefill below this, in nats. Needs calibrate.",
        show_default=False,
    ),
]
MinTop1 = Annotated[
    float | None,
    typer.Option(
        "--min-top1",
        metavar="X",
        help="The same for the probability that full prefill, too, finds the first token the likeliest.",
        show_default=False,
    ),
]
MinSure = Annotated[
    float | None,
    typer.Option(
        "--min-sure",
        metavar="X",
        help="Read the prompt again in full at the first token whose likeliest candidate has a smaller probability than this, from 0 to 1.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

HOST_BUDGET, DISK_BUDGET = str(declared("host_budget").default), str(declared("disk_budget").default)
