"""`cachetune ask`: a question over stored documents."""

from __future__ import annotations

import secrets
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachetune_rag.cli import options
from cachetune_rag.cli.console import emit_json, guarded, note, printable, stdout
from cachetune_rag.cli.interrupts import instant_interrupt
from cachetune_rag.cli.passages import Passage, Wanted
from cachetune_rag.cli.session import Loading, open_existing, open_for_writing, opened
from cachetune_store.units import NO_LIMIT

if TYPE_CHECKING:
    from cachetune_rag.answering.answer import Answer
    from cachetune_rag.engine import CacheTune

_SEEDS = 1 << 31
"""Seeds are below this: every generator takes them, and they are short enough to type."""

EPILOG = (
    "[bold]Examples[/bold]\n\n\b\n"
    '  cachetune ask "How do I reset it?" --model ./my-model --store kv-store\n'
    '  cachetune ask "Sum it up." -d guide/setup.md -m ./my-model -s kv-store\n'
    '  cachetune ask "How do I reset it?" -m ./my-model -s kv-store --top-k 8 --full\n\n'
    "Use the --model and --dtype of precompute. For passages found by your own retriever, use the Python interface or "
    "--chunk-file."
)


@guarded
def ask(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What you want to know.", show_default=False)],
    model: options.Model,
    store: options.Store,
    document: options.FromDocuments = None,
    chunk_file: options.ChunkFiles = None,
    top_k: options.Best = None,
    ratio: options.Ratio = "auto",
    selector: options.RequestSelector = "auto",
    max_kl: options.MaxKL = None,
    min_top1: options.MinTop1 = None,
    min_sure: options.MinSure = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens of the answer.")
    ] = 256,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            max=_SEEDS - 1,
            help="Where the model samples its answers: the same seed gives the same answer again. Drawn if left out.",
            show_default=False,
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Answer a second time with nothing reused, to compare answer and time.")
    ] = False,
    tenant: options.Tenant = "",
    gguf_file: options.GgufFile = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    remote: options.Remote = None,
    store_key: options.StoreKey = None,
    encrypt: options.Encrypt = False,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Ask a question over stored documents.

    The answer appears as it is written; the line below says how many tokens were reused, and how long the first took.
    """
    wanted = Wanted.of(question, document, chunk_file, top_k)
    share = options.ratio_of(ratio)
    with instant_interrupt():
        from cachetune_rag.reuse.config import check_reuse

    reuse = {"ratio": share, "selector": selector, "max_kl": max_kl, "min_top1": min_top1, "min_sure": min_sure}
    check_reuse(**reuse)
    if wanted.documents or wanted.best:
        kv = open_existing(store, remote=remote, store_key=store_key)
    else:
        kv = open_for_writing(
            store,
            codec="exact",
            host_budget="0",
            disk_budget=str(NO_LIMIT),
            remote=remote,
            store_key=store_key,
            encrypt=encrypt,
        )
    with opened(kv, Loading(model, gguf_file, dtype, device, tenant), documents=wanted.documents) as engine:
        passages = wanted.find(engine, kv, question)
        request: dict[str, Any] = {
            "query": question,
            "chunks": [passage.text for passage in passages],
            "max_new_tokens": max_new_tokens,
            **_seed(engine, seed),
        }
        reused, whole = _answers(engine, request, reuse, full=full, quiet=json_output)
    if json_output:
        emit_json(_result(question, passages, reused, whole, request.get("seed")))
    elif whole is not None:
        _compare(reused, whole)


def _answers(
    engine: CacheTune, request: dict[str, Any], reuse: dict[str, Any], *, full: bool, quiet: bool
) -> tuple[Answer, Answer | None]:
    """The answer with reuse, and with `full` the one without; both are printed as they come unless `quiet`."""
    if not full:
        return _answer(engine, {**request, **reuse}, quiet=quiet), None
    # A process's first forward is slower. Run one here, so that the answer with reuse, which comes first, doesn't pay for that.
    engine.full_prefill(query=request["query"])
    if not quiet:
        stdout().print("With reuse:", style="bold")
    reused = _answer(engine, {**request, **reuse}, quiet=quiet)
    engine.flush()  # so that missed chunks are not stored while the other answer is timed
    if not quiet:
        stdout().print("\nFull prefill:", style="bold")
    return reused, _answer(engine, {**request, "reuse": False}, quiet=quiet)


def _seed(engine: CacheTune, seed: int | None) -> dict[str, int]:
    """The seed to ask with, if the model samples. Both answers of --full get the same one; with two seeds they would differ anyway."""
    sampling = _sampling(engine)
    if sampling is None:
        return {}
    chosen = secrets.randbelow(_SEEDS) if seed is None else seed
    note(f"The model's generation config samples{sampling}: --seed {chosen} gives the same again.")
    return {"seed": chosen}


def _answer(engine: CacheTune, request: dict[str, Any], *, quiet: bool) -> Answer:
    """The answer, printed as it comes unless `quiet`."""
    with engine.stream(**request) as pieces:
        for piece in pieces:
            if not quiet:
                sys.stdout.write(printable(piece))
                sys.stdout.flush()
        answer = pieces.answer
    if not quiet:
        sys.stdout.write("\n")
        stdout().print(f"[{answer.report}]", style="dim")
    return answer


def _sampling(engine: CacheTune) -> str | None:
    """How the model's own configuration has answers sampled, in words; None where the likeliest token is taken."""
    config = engine.adapter.model.generation_config
    if not config.do_sample:
        return None
    given = {name: getattr(config, name, None) for name in ("temperature", "top_p", "top_k")}
    told = ", ".join(f"{name} {value:g}" for name, value in given.items() if value is not None)
    return f" ({told})" if told else ""


def _result(
    question: str, passages: list[Passage], reused: Answer, whole: Answer | None, seed: int | None
) -> dict[str, Any]:
    result = {
        "question": question,
        **_fields(reused),
        "seed": seed,
        "passages": [{"source": passage.source, "key": passage.key} for passage in passages],
        "full": None if whole is None else _fields(whole),
    }
    if whole is not None:
        result["same_answer"] = reused.token_ids == whole.token_ids
    return result


def _fields(answer: Answer) -> dict[str, Any]:
    return {"answer": answer.text, "finish_reason": answer.finish_reason, "report": answer.report.as_dict()}


def _compare(reused: Answer, whole: Answer) -> None:
    same = "the same answer" if reused.token_ids == whole.token_ids else "another answer"
    faster = whole.report.ttft / reused.report.ttft
    speed = f"{faster:.1f} times sooner" if faster >= 1 else f"{1 / faster:.1f} times later"
    stdout().print(f"\nReuse gave {same}, and its first token {speed}.", style="bold")
