"""`cachetune change-key`: give a store that has a key another one. No model is loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from cachetune_rag.checking.escaping import visible_line
from cachetune_rag.cli import options
from cachetune_rag.cli.console import emit_json, guarded, stdout
from cachetune_rag.cli.session import open_existing

EPILOG = (
    "[bold]Example[/bold]\n\n\b\n"
    "  openssl rand -hex 32 > new.key\n"
    "  cachetune change-key --store kv-store --store-key old.key --new-store-key new.key"
)


@guarded
def change_key(
    store: options.Store,
    store_key: Annotated[
        str, typer.Option("--store-key", metavar="FILE", help="File with the store's key, or env:NAME.")
    ],
    new_store_key: Annotated[
        str, typer.Option("--new-store-key", metavar="FILE", help="File with the key that it is to have, or env:NAME.")
    ],
    remote: options.Remote = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Give a store another key. Nothing that is stored is written again, so this takes a moment.

    With --remote, the shared place is given the new key as well. Run it on the other machines without --remote.
    """
    with open_existing(store, remote=remote, store_key=store_key) as kv:
        kv.change_key(new_store_key)
    if json_output:
        emit_json({"store": str(store), "changed": True})
    else:
        stdout().print(f"{visible_line(store)} has the new key. Start what uses it with that one from now on.")
