"""`cachetune stats`: what a store holds. No model is loaded."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachetune_rag.checking.escaping import visible_line
from cachetune_rag.cli import options
from cachetune_rag.cli.console import emit_json, guarded, number, size, stdout
from cachetune_rag.cli.session import open_existing
from cachetune_store.printing import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cachetune_store import ChunkGroup, DocumentInfo, Namespace, TenantStats, TierUsage

EPILOG = (
    "[bold]Examples[/bold]\n\n\b\n"
    "  cachetune stats --store kv-store\n"
    "  cachetune stats --store kv-store --documents\n"
    "  cachetune stats --store kv-store --tenant acme --documents\n\n"
    "Without --tenant, totals are those of all tenants, who stand there by a hash of their names (the first 12 hex digits of "
    "SHA-256), and the documents are those stored without one."
)


@guarded
def stats(
    store: options.Store,
    documents: Annotated[bool, typer.Option("--documents", help="List the documents, too.")] = False,
    tenant: Annotated[
        str | None,
        typer.Option(
            "--tenant", metavar="NAME", help='Count this tenant\'s alone; "": what has none.', show_default=False
        ),
    ] = None,
    remote: options.Remote = None,
    store_key: options.StoreKey = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what a store holds."""
    with open_existing(store, remote=remote, store_key=store_key) as kv:
        totals = kv.stats()
        groups = kv.groups()
        found = kv.tenants(groups)
        if tenant is None:
            tokens = sum(count for *_, count in kv.texts())
        else:
            found = [each for each in found if each.tenant == tenant]
            groups = [group for group in groups if group.namespace.tenant == tenant]
            spaces = dict.fromkeys(group.namespace for group in groups)
            tokens = sum(count for space in spaces for *_, count in kv.texts(namespace=space))
        listed = kv.documents(tenant=tenant or "") if documents else []
    tier = totals.disk
    assert tier is not None  # a store at a path has a disk tier
    result: dict[str, Any] = {
        "store": str(store),
        "documents": totals.documents if tenant is None else sum(each.documents for each in found),
        "chunks": tier.chunks if tenant is None else sum(each.chunks for each in found),
        "tokens": tokens,
        "bytes": tier.bytes if tenant is None else sum(each.bytes for each in found),
        "groups": [_group(group) for group in groups],
    }
    if totals.remote is not None and tenant is None:
        result["remote"] = {"url": kv.remote, "chunks": totals.remote.chunks, "bytes": totals.remote.bytes}
    if tenant is None:
        result["tenants"] = [_tenant(each) for each in found]
        result["lifetime"] = {name: asdict(usage) for name, usage in totals.lifetime.items()}
    if documents:
        result["document_list"] = [
            {"id": info.id, "chunks": len(info.chunks), "stored": info.stored, "bytes": info.bytes} for info in listed
        ]
    if json_output:
        emit_json(result)
        return
    console = stdout()
    whose = f", tenant {shown(tenant)}" if tenant else ", without a tenant" if tenant == "" else ""
    console.print(
        f"{visible_line(store)}{whose}: {number(result['documents'], 'document')}, {number(result['chunks'], 'chunk')}, "
        f"{number(tokens, 'token')}, {size(result['bytes'])}",
        soft_wrap=True,
    )
    if tenant is None:
        _print_usage(console, totals.lifetime["disk"])
        if totals.remote is not None:
            console.print(
                f"{visible_line(kv.remote)}: {number(totals.remote.chunks, 'chunk')}, {size(totals.remote.bytes)}",
                soft_wrap=True,
            )
    if len(groups) > 1:
        _print_groups(console, groups)
    if tenant is None and any(each.tenant for each in found):
        _print_tenants(console, found)
    if documents:
        _print_documents(console, listed)


def describe_lead_in(namespace: Namespace) -> str:
    """The lead-ins of a group of chunks, in a few words."""
    leads = namespace.lead_ins
    return f"mean over {len(leads)} lead-ins" if len(leads) > 1 else f"lead-in of {number(len(leads[0]), 'token')}"


def _hashed(tenant: str) -> str:
    """A tenant's numbers, with a hash instead of the name, which may be confidential."""
    return hashlib.sha256(tenant.encode("utf-8", "surrogatepass")).hexdigest()[:12] if tenant else ""


def _tenant(each: TenantStats) -> dict[str, Any]:
    return asdict(each) | {"tenant": _hashed(each.tenant)}


def _group(group: ChunkGroup) -> dict[str, Any]:
    made = group.namespace
    return {
        "model": made.model,
        "tokenizer": made.tokenizer,
        "dtype": made.dtype,
        "codec": group.codec,
        "lead_in": describe_lead_in(made),
        "tenant": _hashed(made.tenant),
        "chunks": group.chunks,
        "bytes": group.bytes,
    }


def _print_usage(console: Any, usage: TierUsage) -> None:
    """A line about what the disk tier did in all processes."""
    looked = usage.hits + usage.misses
    if not looked and not usage.damaged:
        return
    p50, p95 = usage.read_seconds["p50"], usage.read_seconds["p95"]
    took = f"; a chunk was read in {1e3 * p50:.1f} ms (p95 {1e3 * p95:.1f} ms)" if p50 and p95 else ""
    console.print(
        f"So far: {usage.hits:,} of {number(looked, 'look-up')} found, {size(usage.bytes_read)} read, "
        f"{number(usage.evictions, 'eviction')}, {number(usage.damaged, 'damaged chunk')}{took}",
        soft_wrap=True,
    )


def _print_groups(console: Any, groups: Sequence[ChunkGroup]) -> None:
    console.print("Made with different settings (cachetune prune --stale removes what a model can't use):")
    for group in map(_group, groups):
        console.print(
            f"{group['chunks']:>12,}  {size(group['bytes']):>10}  model {group['model'][:12]}, {group['dtype']}, {group['codec']}, "
            f"{group['lead_in']}" + (f", tenant {group['tenant']}" if group["tenant"] else ""),
            soft_wrap=True,
        )


def _print_tenants(console: Any, found: Sequence[TenantStats]) -> None:
    console.print(f"{'Chunks':>12}  {'Bytes':>10}  {'Documents':>9}  Tenant (hashed)", style="bold")
    for each in found:
        console.print(
            f"{each.chunks:>12,}  {size(each.bytes):>10}  {each.documents:>9,}  {_hashed(each.tenant) or '(none)'}",
            soft_wrap=True,
        )


def _print_documents(console: Any, listed: Sequence[DocumentInfo]) -> None:
    console.print(f"{'Chunks':>12}  {'Bytes':>10}  Document", style="bold")
    for info in listed:
        missing = len(set(info.chunks)) - info.stored
        held = f"{len(info.chunks) - missing} of {len(info.chunks)}" if missing else str(len(info.chunks))
        console.print(f"{held:>12}  {size(info.bytes):>10}  {visible_line(info.id)}", soft_wrap=True)
