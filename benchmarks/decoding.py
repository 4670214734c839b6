"""Seconds that each token of an answer takes, by the engine's decoding steps and by those of transformers.

    python benchmarks/decoding.py --shape llama-3.1-8b --device cuda --out benchmarks/results/decoding-h100.json

The prompt is prefilled from host memory and nothing of it is recomputed. In every round both ways take turns, and decode the same number
of tokens greedily. A token is finished when its number is on the host, as in an answer that is streamed. "transformers" is the model's
own forward over its own cache. Where this package's kernels don't run, the engine does the same.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import environment, spread, write_json
from speed.machine import driver
from speed.shapes import SHAPES
from speed.subject import QUERY, Subject

from cachetune_rag.reuse.config import ReuseConfig


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--out", type=Path, help="file for the JSON (default: standard output)")
    args = parser.parse_args(arguments)
    with Subject(args.shape, args.device, None, args.contexts, args.chunk_tokens) as subject:
        subject.store("exact", "host")
        subject.warmup()
        gc.collect()
        gc.freeze()
        rows = [measure(subject, context, "exact", args.new_tokens, args.rounds) for context in args.contexts]
    env = environment() | ({"commit": args.commit} if args.commit else {}) | {"driver": driver()}
    settings = {name: getattr(args, name) for name in ("shape", "chunk_tokens", "new_tokens", "rounds")}
    write_json(args.out, {"benchmark": "decoding", "environment": env, "settings": settings, "rows": rows})
    print(table(rows))


def measure(subject: Subject, context: int, codec: str, tokens: int, count: int) -> dict[str, Any]:
    """Seconds a token, for both ways."""
    engine, adapter = subject.engine, subject.engine.adapter
    prompt = engine.prompts.build(query=QUERY, chunks=subject.chunks(context, codec), prefix="")

    def prefilled() -> Any:
        config = ReuseConfig("none", 0.0)
        return engine.runtime.assembler.prefill(prompt, config, time.perf_counter(), answer_tokens=tokens)

    def quick() -> Callable[[int], torch.Tensor]:
        state = prefilled()
        return adapter.quick_steps(state.cache, state.buffers, tokens)

    ways = {"transformers": lambda: adapter.steps(prefilled().cache), "engine": quick}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(count + 1):
        for name, steps in ways.items():
            took = _decode(steps(), tokens)
            if round_:  # the first compiles and captures
                times[name].append(took)
    median = {name: statistics.median(samples) for name, samples in times.items()}
    return {
        "context": context,
        "seconds_a_token": {name: spread(samples) for name, samples in times.items()},
        "speedup": median["transformers"] / median["engine"],
    }


def _decode(step: Callable[[int], torch.Tensor], tokens: int) -> float:
    """Seconds a token of greedy decoding. The first token, for which memory is made, is counted separately."""
    token = int(step(1).argmax())
    started = time.perf_counter()
    for _ in range(tokens - 1):
        token = int(step(token).argmax())
    return (time.perf_counter() - started) / (tokens - 1)


def table(rows: list[dict[str, Any]]) -> str:
    """The result as text."""
    lines = ["| context | transformers, ms a token | this engine | |", "| --- | --- | --- | --- |"]
    for row in rows:
        theirs, ours = (row["seconds_a_token"][name]["median"] * 1e3 for name in ("transformers", "engine"))
        lines.append(f"| {row['context']:,} | {theirs:.1f} | {ours:.1f} | {row['speedup']:.1f}x |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
