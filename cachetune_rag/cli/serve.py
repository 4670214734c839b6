"""`cachetune serve`: a vLLM server that reuses stored chunks. The command is `cachetune_vllm.serve`, which stands above this package."""

from __future__ import annotations

import os
import sys

import typer

EPILOG = (
    "[bold]Examples[/bold]\n\n\b\n"
    "  cachetune serve ./my-model --store kv-store --port 8000\n"
    "  cachetune serve ./my-model --store kv-store --dry-run --max-model-len 32768\n\n"
    "'cachetune serve --help' shows the options of the store; all others are those of 'vllm serve'."
)

ANYTHING = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Every word is passed on as it is."""


def serve(context: typer.Context) -> None:
    """Serve a model with vLLM, and reuse stored passages in every prompt that shows them.

    Takes MODEL, --store and the options of 'vllm serve'. Clients need no change.
    """
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "cachetune_vllm.serve", *context.args])
