"""`cachetune tune`: the ratio at which each tier answers soonest on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachetune_rag.cli import options
from cachetune_rag.cli.console import UsageError, emit_json, guarded, note, number, stdout
from cachetune_rag.cli.interrupts import instant_interrupt
from cachetune_rag.cli.meter import Meter
from cachetune_rag.cli.plots import check_plot, draw_tuning, save_plot
from cachetune_rag.cli.prompt_files import prompts_from, read_samples
from cachetune_rag.cli.session import Loading, open_existing, opened
from cachetune_store.tier_kinds import NAMES

if TYPE_CHECKING:
    from cachetune_rag.measuring.tuning import TierTuning, TuneProgress

EPILOG = (
    "[bold]Examples[/bold]\n\n\b\n"
    "  cachetune tune --model ./my-model --store kv-store\n"
    "  cachetune tune questions.txt -m ./my-model -s kv-store --top-k 8\n"
    "  cachetune tune -m ./my-model -s kv-store --tier disk --selector frequency --plot ttft.svg\n"
    "  cachetune tune -m ./my-model -s kv-store --device-budget 8GiB\n\n"
    "Without files, prompts are made of stored passages; give --tokens the size of yours. Files are those of calibrate: "
    "text with a question a line, or JSONL with query and chunks.\n\n"
    "Run 'cachetune calibrate' before: its ratio is the least that is tried."
)


@guarded
def tune(
    model: options.Model,
    store: options.Store,
    samples: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="JSONL files of prompts, or text files with a question a line.",
            show_default=False,
        ),
    ] = None,
    tier: Annotated[
        str,
        typer.Option(
            "--tier",
            metavar="NAME",
            help=f"{', '.join(NAMES)}, or auto: each that has a budget. (disk is read as if never before.)",
        ),
    ] = "auto",
    selector: options.RatioSelector = "auto",
    r_min: Annotated[
        float | None,
        typer.Option(
            "--r-min",
            metavar="R",
            help="Least ratio. If left out: the one that calibrate found, or 0.15.",
            show_default=False,
        ),
    ] = None,
    r_max: Annotated[float, typer.Option("--r-max", metavar="R", help="Largest ratio.")] = 1.0,
    rounds: Annotated[int, typer.Option("--rounds", help="Times that each setting is measured.")] = 3,
    tokens: Annotated[int, typer.Option("--tokens", help="Passage tokens of a prompt that is made.")] = 4096,
    top_k: options.TopK = options.DEFAULT_TOP_K,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            parser=options.path_of,
            help="Plot times against ratios into this file (.svg, .png, .pdf).",
        ),
    ] = None,
    tenant: options.Tenant = "",
    gguf_file: options.GgufFile = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    host_budget: options.HostBudget = options.HOST_BUDGET,
    device_budget: options.DeviceBudget = "0",
    remote: options.Remote = None,
    store_key: options.StoreKey = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Find the ratio at which the first token comes soonest, for passages in each kind of memory and on disk, and save it.

    Every later --ratio auto on this store means that ratio, on the same machine, for the same model, selector and codec.
    Nothing else should use the machine meanwhile.
    """
    given = read_samples(samples) if samples else None
    if plot is not None:
        check_plot(plot)
    with instant_interrupt():
        from cachetune_rag.measuring.tuning.tuner import TuningPlan

    wanted: dict[str, Any] = {
        "tier": tier, "selector": selector, "r_min": r_min, "r_max": r_max, "rounds": rounds, "tokens": tokens,
    }  # fmt: skip
    TuningPlan.of(**wanted)  # refuses what makes no sense before the model is loaded
    kv = open_existing(
        store, host_budget, device_budget=device_budget, device=device, remote=remote, store_key=store_key
    )
    with opened(kv, Loading(model, gguf_file, dtype, device, tenant), saves="tuned") as engine:
        prompts = None if given is None else prompts_from(engine, kv, given, [], top_k)
        note("Tuning ..." if prompts is None else f"Tuning with {number(len(prompts), 'prompt')} ...")
        # How many settings will be measured is known only at the end.
        with Meter("Measuring full prefill ...", countable=False) as meter:
            found = engine.tune(prompts, progress=lambda progress: meter.update(_progress(progress)), **wanted)
    if plot is not None:
        save_plot(draw_tuning(found), plot)
    if json_output:
        emit_json({"store": str(store), **found.as_dict(), "plot": None if plot is None else str(plot)})
    else:
        lines = [found.hardware, *(line for each in found.tiers for line in ("", *_table(each), "", _conclusion(each)))]
        stdout().print("\n".join(lines))
    if not all(each.saved for each in found.tiers):
        raise UsageError(f"the ratios could not be saved in {store}: check that this user can write there.")


def _table(found: TierTuning) -> list[str]:
    lines = [f"{'ratio':>6}  {'skipped':>7}  {'first token':>12}  {'spread':>9}  {'bound':>10}"]
    for each in found.points:
        spread = max(each.samples) - min(each.samples)
        mark = "  <-" if (each.ratio, each.skipped) == (found.ratio, found.skipped) else ""
        lines.append(
            f"{each.ratio:>6g}  {each.skipped:>7g}  {_ms(each.ttft):>12}  {_ms(spread):>9}  "
            f"{_ms(found.cost.roofline(each.ratio, each.skipped)):>10}{mark}"
        )
    return lines


def _conclusion(found: TierTuning) -> str:
    cost, floor = found.cost, "calibrated" if found.calibrated else "given or usual"
    return (
        f"{found.tier} ({found.codec}, {found.selector}): ratio {found.ratio:g}, {found.skipped:g} of it not read. First token "
        f"after {_ms(found.ttft)}, {found.speedup:.1f}x as soon as full prefill ({_ms(found.full)}).\n"
        f"A token of a layer takes {cost.move * 1e6:.2f} us to move and {cost.compute * 1e6:.2f} us to compute: balance at "
        f"{cost.balance:.2f}. Least ratio {found.r_min:g} ({floor}). --ratio auto now means this."
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def _progress(progress: TuneProgress) -> str:
    point, best = progress.point, progress.best
    return (
        f"{progress.tier}, setting {progress.measured}: ratio {point.ratio:g} {_ms(point.ttft)}; best so far "
        f"{best.ratio:g} {_ms(best.ttft)}"
    )
