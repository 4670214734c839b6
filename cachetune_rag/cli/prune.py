"""`cachetune prune`: remove chunks that a model can't use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cachetune_rag.cli import options
from cachetune_rag.cli.console import UsageError, emit_json, guarded, number, size, stdout
from cachetune_rag.cli.session import Loading, load_engine, open_existing

if TYPE_CHECKING:
    from collections.abc import Callable

    from cachetune_store import Namespace
    from cachetune_store.chunk import ChunkHead

EPILOG = (
    "[bold]Examples[/bold]\n\n\b\n"
    "  cachetune prune --stale --model ./my-model --store kv-store --dry-run\n"
    "  cachetune prune --stale --model ./my-model --store kv-store"
)


@guarded
def prune(
    model: options.Model,
    store: options.Store,
    stale: Annotated[
        bool, typer.Option("--stale", help="Remove chunks of other models or weights, tokenizers, dtypes, lead-ins.")
    ] = False,
    codec: Annotated[
        str | None, typer.Option("--codec", metavar="NAME", help="Remove chunks of other codecs than this, too.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    tenant: Annotated[
        str,
        typer.Option(
            "--tenant",
            metavar="NAME",
            help="Whose chunks behind other lead-ins go. Left out: those without a tenant. (Of all tenants, chunks of other "
            "models, tokenizers and dtypes go.)",
            show_default=False,
        ),
    ] = "",
    gguf_file: options.GgufFile = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    remote: options.Remote = None,
    store_key: options.StoreKey = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Remove what a model can't use: chunks made by another model or with other settings, and files of other releases.

    Such chunks are never used by mistake; they only take room. Documents stay: precompute them again to fill the gaps.
    """
    if not stale:
        raise UsageError("nothing to prune was named: give --stale (with --dry-run to see first what would go).")
    loading = Loading(model, gguf_file, dtype, device, tenant)
    with (
        open_existing(store, remote=remote, store_key=store_key) as kv,
        load_engine(loading, kv, any_store=True) as engine,
    ):
        report = kv.prune(keeper(engine.namespace, codec), foreign_too=True, dry_run=dry_run)
    if json_output:
        emit_json({"store": str(store), "dry_run": dry_run, **report.as_dict()})
        return
    verb = "Would remove" if dry_run else "Removed"
    foreign = f" and {number(report.foreign, 'file')} of another format version" if report.foreign else ""
    stdout().print(f"{verb} {number(report.chunks, 'stale chunk')}{foreign}: {size(report.bytes)}")


def keeper(namespace: Namespace, codec: str | None = None) -> Callable[[ChunkHead], bool]:
    """A function that says which chunks an engine with this namespace can use. Chunks of other tenants by the same model stay too."""

    def keep(head: ChunkHead) -> bool:
        made = head.namespace
        if codec is not None and head.layout.codec != codec:
            return False
        if made.tenant != namespace.tenant:
            return (made.model, made.tokenizer, made.dtype) == (namespace.model, namespace.tokenizer, namespace.dtype)
        return made == namespace

    return keep
