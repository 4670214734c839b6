"""`cachetune stats`, `verify` and `remove`: looking after a store. No model is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from cachetune_rag.commands import options
from cachetune_rag.commands.console import UsageError, emit_json, guarded, number, size, stdout
from cachetune_rag.commands.session import open_existing

DAMAGED = 1
"""Exit status of verify when it found damage."""

STATS_EPILOG = (
    "[bold]Examples[/bold]\n\n\b\n  cachetune stats --store kv-store\n  cachetune stats --store kv-store --documents"
)
VERIFY_EPILOG = (
    "[bold]Example[/bold]\n\n\b\n"
    "  cachetune verify --store kv-store\n\n"
    "Exit status 0: all is well; 1: damage was found and set aside. Precompute again to fill the gaps."
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
    result: dict[str, Any] = {
        "store": str(store),
        "documents": totals.documents,
        "chunks": tier.chunks,
        "tokens": tokens,
        "bytes": tier.bytes,
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
    if documents:
        console.print(f"{'Chunks':>12}  {'Bytes':>10}  Document", style="bold")
        for info in listed:
            missing = len(set(info.chunks)) - info.stored
            held = f"{len(info.chunks) - missing} of {len(info.chunks)}" if missing else str(len(info.chunks))
            console.print(f"{held:>12}  {size(info.bytes):>10}  {info.id}", markup=False, soft_wrap=True)


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
        found = "all in order" if report.ok else f"{number(len(report.damaged), 'damaged file')} set aside"
        repairs = [
            number(report.temp_files, "leftover") + " deleted" if report.temp_files else "",
            number(report.adopted, "file") + " added to the index" if report.adopted else "",
            number(report.dropped, "missing file") + " dropped from the index" if report.dropped else "",
        ]
        stdout().print(
            "; ".join(
                [f"{number(report.checked, 'file')} checked ({size(report.bytes)}): {found}", *filter(None, repairs)]
            ),
        )
        for key in report.damaged:
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
