"""`cachetune verify` and `remove`, which maintain a store. No model is loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from cachetune_rag.checking.escaping import visible_line
from cachetune_rag.cli import options
from cachetune_rag.cli.console import UsageError, emit_json, guarded, number, size, stdout
from cachetune_rag.cli.session import check_known, open_existing

DAMAGED = 1
"""Exit status of verify when it found damage, or files that it couldn't read."""

VERIFY_EPILOG = (
    "[bold]Example[/bold]\n\n\b\n"
    "  cachetune verify --store kv-store\n\n"
    "Exit status 0: all is well; 1: damage was found and set aside (precompute again to fill the gaps), or a file could "
    "not be read."
)
REMOVE_EPILOG = (
    "[bold]Examples[/bold]\n\n\b\n"
    "  cachetune remove guide/setup.md --store kv-store\n"
    "  cachetune remove --all --tenant acme --store kv-store\n"
    "  cachetune stats --store kv-store --documents    # the ids there are"
)


@guarded
def verify(
    store: options.Store,
    remote: options.Remote = None,
    store_key: options.StoreKey = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Read every file of a store again and check it in full.

    Damaged files are set aside, leftovers of crashed writers are deleted, and the index is repaired.
    """
    with open_existing(store, remote=remote, store_key=store_key) as kv:
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
            stdout().print(f"  {visible_line(key)}")
    if not report.ok:
        raise typer.Exit(DAMAGED)


@guarded
def remove(
    store: options.Store,
    documents: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DOCUMENT]...", help="Ids of documents.", show_default=False),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="All that is the tenant's, or stored without one: documents, chunks that no document holds, lead-ins.",
        ),
    ] = False,
    tenant: options.Tenant = "",
    remote: options.Remote = None,
    store_key: options.StoreKey = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Remove documents from a store, with the chunks that no other document holds."""
    wanted = list(dict.fromkeys(documents or ()))
    if bool(wanted) == everything:
        raise UsageError("give the ids of the documents to remove, or --all.")
    with open_existing(store, remote=remote, store_key=store_key) as kv:
        if everything:
            # The tenant as a whole, whose secret an encrypted store erases first.
            freed = {info.id: info.bytes for info in kv.documents(tenant=tenant)}
            total = kv.delete_tenant(tenant)
        else:
            check_known(wanted, kv, tenant)
            freed = {name: kv.delete_document(name, tenant=tenant) for name in wanted}
            total = sum(freed.values())
    if json_output:
        removed = [{"id": name, "bytes": count} for name, count in freed.items()]
        emit_json({"store": str(store), "removed": removed, "bytes": total})
    else:
        stdout().print(f"Removed {number(len(freed), 'document')}, {size(total)} freed")
