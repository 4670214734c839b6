"""`cachetune explain`: what became of a prompt, as a page, as JSON or in a few lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachetune_rag.checking.escaping import visible_line
from cachetune_rag.cli import options
from cachetune_rag.cli.console import UsageError, emit_json, guarded, note, number, stdout
from cachetune_rag.cli.interrupts import instant_interrupt
from cachetune_rag.cli.passages import Wanted
from cachetune_rag.cli.session import Loading, open_existing, opened
from cachetune_rag.cli.written import check_writable, write_whole

if TYPE_CHECKING:
    from cachetune_rag.explaining import Explanation

EPILOG = (
    "[bold]Examples[/bold]\n\n\b\n"
    '  cachetune explain "How do I reset it?" -m ./my-model -s kv-store --html page.html\n'
    '  cachetune explain "How do I reset it?" -m ./my-model -s kv-store --compare --html page.html\n'
    '  cachetune explain "Sum it up." -d guide/setup.md -m ./my-model -s kv-store --json\n\n'
    "docs/explain.md says how to read the page. Chunks that are not in the store are not put there."
)

Html = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        help="Write a page that shows it: one file, for any browser, without network.",
        parser=options.path_of,
        show_default=False,
    ),
]


@guarded
def explain(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What you want to know.", show_default=False)],
    model: options.Model,
    store: options.Store,
    html: Html = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Compute the whole prompt as well, and say how far reuse is from that."),
    ] = False,
    document: options.FromDocuments = None,
    chunk_file: options.ChunkFiles = None,
    top_k: options.Best = None,
    ratio: options.Ratio = "auto",
    selector: options.RequestSelector = "auto",
    max_kl: options.MaxKL = None,
    min_top1: options.MinTop1 = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens of an answer.")
    ] = 64,
    tenant: options.Tenant = "",
    gguf_file: options.GgufFile = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    remote: options.Remote = None,
    store_key: options.StoreKey = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what became of a prompt.

    It is read as by ask. Then you see which tokens were reused, recomputed or missed, why each chunk was or was not found, what the
    question attends to, and where the time went.
    """
    wanted = Wanted.of(question, document, chunk_file, top_k)
    if html is not None:
        check_writable(html, "--html")
    with instant_interrupt():
        from cachetune_rag.reuse.config import check_reuse

    reuse: dict[str, Any] = {
        "ratio": options.ratio_of(ratio),
        "selector": selector,
        "max_kl": max_kl,
        "min_top1": min_top1,
    }
    check_reuse(**reuse)
    loading = Loading(model, gguf_file, dtype, device, tenant)
    with opened(
        open_existing(store, remote=remote, store_key=store_key), loading, documents=wanted.documents
    ) as engine:
        passages = wanted.find(engine, engine.store, question)
        # A process's first forward is slower. Run one here, so that the times are those of a server that has been asked before.
        engine.full_prefill(query=question)
        chunks = [passage.text for passage in passages]
        found = engine.explain(question, chunks, compare=compare, max_new_tokens=max_new_tokens, **reuse)
    show(found, html, json_output=json_output)


RESPONSE_EPILOG = (
    "[bold]Examples[/bold]\n\n\b\n"
    "  cachetune explain-response response.json --html page.html\n"
    "  curl ... | cachetune explain-response - --html page.html\n\n"
    'The request has to say "kv_transfer_params": {"cachetune": {"explain": true}}. docs/explain.md says what the page can\'t show.'
)


@guarded
def explain_response(
    response: Annotated[
        str,
        typer.Argument(metavar="FILE", help="The server's whole response as JSON; - is stdin.", show_default=False),
    ],
    html: Html = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what became of a prompt that a vLLM server answered, from its response alone.

    Neither the model nor the store is needed.
    """
    if html is not None:
        check_writable(html, "--html")
    name = "stdin" if response == "-" else response
    with instant_interrupt():
        from cachetune_rag.explaining.served import explanation_of

    try:
        given = json.loads(sys.stdin.read() if response == "-" else options.path_of(response).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{visible_line(name)} is no JSON ({error}): give the server's response as it came."
        ) from error
    show(explanation_of(given), html, json_output=json_output)


def show(explanation: Explanation, html: Path | None, *, json_output: bool) -> None:
    """Write the page, and print JSON or a few lines."""
    if html is not None:
        from cachetune_rag.explaining import html_page

        write_whole(html, html_page(explanation).encode())
        note(f"Wrote {html}")
    if json_output:
        emit_json(explanation.as_dict())
    else:
        stdout().print("\n".join(_lines(explanation)))


def _lines(e: Explanation) -> list[str]:
    """What is most worth knowing, in lines for a terminal."""
    from cachetune_rag.explaining.overview import view_of

    view = view_of(e)
    total = sum(view.counts.values())
    counts = ", ".join(f"{count:,} {fate}" for fate, count in view.counts.items())
    lines = [
        f"{number(total, 'token')}: {counts}",
        *(f"{name}: {figure} ({below})" for name, figure, below in view.tiles),
    ]
    lines += e.report.get("advice") or ()
    if e.left:
        lines.append(f"Left to vLLM: {e.left}. {e.report.get('why') or ''}".rstrip())
    by_number = {part.chunk: part for part in e.parts if part.kind == "chunk"}
    for chunk in e.chunks:
        part = by_number.get(chunk.number)
        of = f" {number(part.tokens, 'token')}, {part.count('reused'):,} reused" if part else ""
        where = f" ({visible_line(chunk.document)})" if chunk.document else ""
        lines.append(f"Chunk {chunk.number + 1}{where}: {chunk.outcome},{of}".rstrip(","))
        if chunk.outcome != "stored":
            lines.append(f"    {chunk.why}")
        if chunk.near is not None:
            lines += _difference(chunk.near.meaning, chunk.near.at, chunk.near.stored, chunk.near.shown)
    for near in e.near:
        lines += ["Outside of the chunks:", *_difference(near.meaning, near.at, near.stored, near.shown)]
    return lines


def _difference(meaning: str, at: int, stored: str, shown: str) -> list[str]:
    return [
        f"    The nearest stored text: {meaning}. After {number(at, 'character')}:",
        f"      stored: {visible_line(stored) or '(ends)'}",
        f"      prompt: {visible_line(shown) or '(ends)'}",
    ]
