"""`cachetune calibrate`: the ratio that one's own prompts need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachetune_rag.cli import options
from cachetune_rag.cli.console import UsageError, emit_json, guarded, note, number, stdout
from cachetune_rag.cli.interrupts import instant_interrupt
from cachetune_rag.cli.meter import Meter
from cachetune_rag.cli.plots import check_plot, draw_calibration, save_plot
from cachetune_rag.cli.prompt_files import prompts_from, read_samples
from cachetune_rag.cli.session import Loading, open_existing, opened
from cachetune_store.printing import shown

if TYPE_CHECKING:
    from cachetune_rag.measuring.calibration.calibrator import CalibrationProgress
    from cachetune_rag.measuring.calibration.result import Calibration

EPILOG = (
    "[bold]Examples[/bold]\n\n\b\n"
    "  cachetune calibrate questions.txt --model ./my-model --store kv-store\n"
    "  cachetune calibrate prompts.jsonl -m ./my-model -s kv-store --bound 0.02 --plot kl.svg\n"
    "  cachetune calibrate prompts.jsonl -m ./my-model -s kv-store --measure top1 --bound 0.98\n\n"
    "[bold]JSONL[/bold]: each line is a prompt as your application makes it. Without chunks they are retrieved as by ask."
    "\n\n\b\n"
    '  {"query": "How do I reset it?", "chunks": ["First passage.", "Second passage."]}\n'
    '  {"query": "What does it weigh?"}\n\n'
    "Use 10 to 50 prompts that are like those to come."
)


@guarded
def calibrate(
    samples: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE", help="JSONL files of prompts, or text files with a question a line.", show_default=False
        ),
    ],
    model: options.Model,
    store: options.Store,
    measure: Annotated[
        str,
        typer.Option(
            "--measure",
            metavar="NAME",
            help="What has to stay within the bound: kl (KL divergence from full prefill, in nats a token), or top1 "
            "(share of tokens that both find the likeliest).",
        ),
    ] = "kl",
    bound: Annotated[
        float | None,
        typer.Option(
            "--bound", metavar="X", help="Most KL, or least share. 0.05 for kl, 0.95 for top1.", show_default=False
        ),
    ] = None,
    quantile: Annotated[
        float | None,
        typer.Option(
            "--quantile",
            metavar="Q",
            help="Let at least this share of the prompts keep the bound, each by itself, rather than their mean.",
            show_default=False,
        ),
    ] = None,
    selector: options.RatioSelector = "auto",
    ratios: Annotated[
        str | None,
        typer.Option("--ratios", metavar="R,R,...", help="Ratios to try; a grid from 0 to 0.7 if left out."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Most tokens to compare after each prompt.")] = 32,
    document: Annotated[
        list[str] | None,
        typer.Option("--document", "-d", metavar="ID", help="Retrieve from this document only. May be repeated."),
    ] = None,
    top_k: options.TopK = options.DEFAULT_TOP_K,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            parser=options.path_of,
            help="Plot the figures into this file (.svg, .png, .pdf).",
        ),
    ] = None,
    tenant: options.Tenant = "",
    gguf_file: options.GgufFile = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    remote: options.Remote = None,
    store_key: options.StoreKey = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Find the smallest ratio that stays close enough to full prefill on your own prompts, and save it.

    Every later --ratio auto on this store means that ratio, for the same model, selector and codec. The prompts run once
    in full and once at every ratio; passages that aren't stored are precomputed first.
    """
    given = read_samples(samples)
    if plot is not None:
        check_plot(plot)
    with instant_interrupt():
        from cachetune_rag.measuring.calibration.calibrator import RATIOS, CalibrationPlan

    wanted: dict[str, Any] = {
        "measure": measure,
        "bound": bound,
        "quantile": quantile,
        "selector": selector,
        "ratios": RATIOS if ratios is None else _numbers(ratios),
        "tokens": tokens,
    }
    CalibrationPlan.of(**wanted)  # refuses what makes no sense before the model is loaded
    documents = list(dict.fromkeys(document or ()))
    loading = Loading(model, gguf_file, dtype, device, tenant)
    with opened(
        open_existing(store, remote=remote, store_key=store_key), loading, documents=documents, saves="calibrated"
    ) as engine:
        prompts = prompts_from(engine, engine.store, given, documents, top_k)
        note(f"Calibrating with {number(len(prompts), 'prompt')} ...")
        with Meter("Calibrating") as meter:

            def show(progress: CalibrationProgress) -> None:
                meter.update(f"prompt {progress.sample} of {progress.samples}", progress.done, progress.total)

            found = engine.calibrate(prompts, progress=show, **wanted)
    if plot is not None:
        save_plot(draw_calibration(found), plot)
    if json_output:
        emit_json({"store": str(store), **found.as_dict(), "plot": None if plot is None else str(plot)})
    else:
        stdout().print("\n".join([*_table(found), "", _conclusion(found)]))
    if not found.saved:
        raise UsageError(f"the ratio could not be saved in {store}: check that this user can write there.")


def _numbers(given: str) -> list[float]:
    try:
        return [float(part) for part in given.split(",")]
    except ValueError:
        raise UsageError(
            f"--ratios is {shown(given)}: use numbers from 0 to 1 with commas between, such as 0.05,0.1."
        ) from None


def _table(found: Calibration) -> list[str]:
    lines = [f"{'ratio':>6}  {'KL':>8}  {'worst':>8}  {'top-1':>6}  {'worst':>6}"]
    for each in found.figures:
        mark = "  <-" if each.ratio == found.ratio else ""
        lines.append(
            f"{each.ratio:>6g}  {each.kl:>8.4f}  {each.kl_worst:>8.4f}  {each.top1:>6.3f}  {each.top1_worst:>6.3f}{mark}"
        )
    return lines


def _conclusion(found: Calibration) -> str:
    held = (
        f"at most {found.bound:g} nats of KL a token"
        if found.measure == "kl"
        else f"top-1 agreement of {found.bound:g}"
    )
    of = "on average" if found.quantile is None else f"for {found.quantile:.0%} of the prompts"
    over = f"{number(found.samples, 'prompt')}, {number(found.target_tokens, 'token')}"
    if found.met:
        return (
            f"Ratio {found.ratio:g} of selector {found.selector} keeps {held} {of} ({over}). --ratio auto now means it."
        )
    return (
        f"No ratio below 1 of selector {found.selector} keeps {held} {of} ({over}). --ratio auto now computes everything: "
        "allow more with --bound, or try another --selector."
    )
