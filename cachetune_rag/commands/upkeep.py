"""`cachetune stats`, `verify` and `remove`: looking after a store. No model is loaded."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachetune_rag.commands import options
from cachetune_rag.commands.console import UsageError, emit_json, guarded, number, size, stdout
from cachetune_rag.commands.session import open_existing

if TYPE_CHECKING:
    from cachetune_store import ChunkGroup, Namespace, TierUsage

DAMAGED = 1
"""Exit status of verify when it found damage, or files that it couldn't read."""

STATS_EPILOG = (
    "[bold]Examples[/bold]\n\n\b\n  cachetune stats --store kv-store\n  cachetune stats --store kv-store --documents"
)
VERIFY_EPILOG = (
    "[bold]Example[/bold]\n\n\b\n"
    "  cachetune verify --store kv-store\n\n"
    "Exit status 0: all is well; 1: damage was found and set aside (precompute again to fill the gaps), or a file could "
    "not be read."
)
REMOVE_EPILOG = (
    "[bold]Examples[/bold]\n\n\b\n"
    "  cachetune remove guide/setup.md --store kv-store\n"
    "  cachetune stats --store kv-store --documents    # the ids there are"
)


@guarded
def stats(
    store: options.Store,
    documents: Annotated[bool, typer.Option("--documents", help="List the documents, too.")] = False,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what a store holds."""
    with open_existing(store) as kv:
        totals = kv.stats()
        tier = totals.disk
        assert tier is not None  # a store at a path has a disk tier
        tokens = sum(count for *_, count in kv.texts())
        listed = kv.documents() if documents else []
        groups = kv.groups()
    result: dict[str, Any] = {
        "store": str(store),
        "documents": totals.documents,
        "chunks": tier.chunks,
        "tokens": tokens,
        "bytes": tier.bytes,
        "groups": [_group(group) for group in groups],
        "lifetime": {name: asdict(usage) for name, usage in totals.lifetime.items()},
    }
    if documents:
        result["document_list"] = [
            {"id": info.id, "chunks": len(info.chunks), "stored": info.stored, "bytes": info.bytes} for info in listed
        ]
    if json_output:
        emit_json(result)
        return
    console = stdout()
    console.print(
        f"{store}: {number(totals.documents, 'document')}, {number(tier.chunks, 'chunk')}, {number(tokens, 'token')}, "
        f"{size(tier.bytes)}",
        markup=False,
    )
    _print_usage(console, totals.lifetime["disk"])
    if len(groups) > 1:
        console.print("Made with different settings (cachetune prune --stale removes what a model can't use):")
        for group in map(_group, groups):
            console.print(
                f"{group['chunks']:>12,}  {size(group['bytes']):>10}  model {group['model'][:12]}, {group['dtype']}, {group['codec']}, "
                f"{group['lead_in']}" + (", a tenant's" if group["tenant"] else ""),
                markup=False,
                soft_wrap=True,
            )
    if documents:
        console.print(f"{'Chunks':>12}  {'Bytes':>10}  Document", style="bold")
        for info in listed:
            missing = len(set(info.chunks)) - info.stored
            held = f"{len(info.chunks) - missing} of {len(info.chunks)}" if missing else str(len(info.chunks))
            console.print(f"{held:>12}  {size(info.bytes):>10}  {info.id}", markup=False, soft_wrap=True)


def _group(group: ChunkGroup) -> dict[str, Any]:
    """A group for people and scripts; tenants by a hash, for their names may tell something."""
    made = group.namespace
    return {
        "model": made.model,
        "tokenizer": made.tokenizer,
        "dtype": made.dtype,
        "codec": group.codec,
        "lead_in": describe_lead_in(made),
        "tenant": hashlib.sha256(made.tenant.encode("utf-8", "surrogatepass")).hexdigest()[:12] if made.tenant else "",
        "chunks": group.chunks,
        "bytes": group.bytes,
    }


def describe_lead_in(namespace: Namespace) -> str:
    """What stood before the chunks when they were computed, in a few words."""
    leads = namespace.lead_ins
    return f"mean over {len(leads)} lead-ins" if len(leads) > 1 else f"lead-in of {number(len(leads[0]), 'token')}"


def _print_usage(console: Any, usage: TierUsage) -> None:
    """One line on what the disk tier did over all processes."""
    looked = usage.hits + usage.misses
    if not looked and not usage.damaged:
        return
    p50, p95 = usage.read_seconds["p50"], usage.read_seconds["p95"]
    took = f"; a chunk was read in {1e3 * p50:.1f} ms (p95 {1e3 * p95:.1f} ms)" if p50 and p95 else ""
    console.print(
        f"So far: {usage.hits:,} of {number(looked, 'look-up')} found, {size(usage.bytes_read)} read, "
        f"{number(usage.evictions, 'eviction')}, {number(usage.damaged, 'damaged chunk')}{took}",
        markup=False,
        soft_wrap=True,
    )


@guarded
def verify(store: options.Store, json_output: options.Json = False, debug: options.Debug = False) -> None:
    """Read every file of a store again and check it in full.

    Damaged files are set aside, leftovers of crashed writers are deleted, and the index is repaired.
    """
    with open_existing(store) as kv:
        report = kv.verify()
    if json_output:
        emit_json({"store": str(store), "ok": report.ok, **report.as_dict()})
    else:
        wrong = [
            f"{number(len(report.damaged), 'damaged file')} set aside" if report.damaged else "",
            f"{number(len(report.unreadable), 'file')} could not be read" if report.unreadable else "",
        ]
        found = ", ".join(filter(None, wrong)) or "all in order"
        repairs = [
            number(report.temp_files, "leftover") + " deleted" if report.temp_files else "",
            number(report.adopted, "file") + " added to the index" if report.adopted else "",
            number(report.dropped, "missing file") + " dropped from the index" if report.dropped else "",
            number(report.foreign, "file") + " of another format version left alone" if report.foreign else "",
        ]
        stdout().print(
            "; ".join(
                [f"{number(report.checked, 'file')} checked ({size(report.bytes)}): {found}", *filter(None, repairs)]
            ),
        )
        for key in (*report.damaged, *report.unreadable):
            stdout().print(f"  {key}")
    if not report.ok:
        raise typer.Exit(DAMAGED)


@guarded
def remove(
    documents: Annotated[list[str], typer.Argument(metavar="DOCUMENT", help="Ids of documents.", show_default=False)],
    store: options.Store,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Remove documents from a store, with the chunks that no other document holds."""
    wanted = list(dict.fromkeys(documents))
    with open_existing(store) as kv:
        check_known(wanted, [info.id for info in kv.documents()])
        freed = {name: kv.delete_document(name) for name in wanted}
    if json_output:
        emit_json(
            {
                "store": str(store),
                "removed": [{"id": name, "bytes": count} for name, count in freed.items()],
                "bytes": sum(freed.values()),
            }
        )
    else:
        stdout().print(f"Removed {number(len(freed), 'document')}, {size(sum(freed.values()))} freed", markup=False)


def check_known(wanted: Iterable[str], known: list[str]) -> None:
    """Refuse document ids that the store doesn't have, before anything is done.

    Raises:
        UsageError: names the id, and those like it.
    """
    for name in wanted:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
            raise UsageError(f"no document {name!r} in the store. {hint}'cachetune stats --documents' lists them.")
