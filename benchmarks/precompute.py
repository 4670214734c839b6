"""How much longer precompute takes than the model's own prefill of the same chunks.

    python benchmarks/precompute.py --out benchmarks/results/precompute-cpu.json

The difference is the runs behind several lead-ins, ranking, encoding, writing and syncing. Every round takes new chunks. It prefills and
precomputes them with each kind of lead-in in turn, so that a machine that becomes slower affects all alike.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import environment, real_chunks, seconds, spread, write_json
from smollm2 import model_path

from cachetune_rag import CacheTune, Document
from cachetune_rag.model.loading import load_model

LEAD_INS = ("first_token", "auto")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--model", type=Path, help="folder of a model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--chunks", type=int, default=8, help="chunks a round")
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--codec", default="exact")
    parser.add_argument("--lead-ins", nargs="+", default=LEAD_INS, choices=LEAD_INS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file for the JSON (default: standard output)")
    args = parser.parse_args()

    model, tokenizer = load_model(args.model or model_path())
    texts = real_chunks(tokenizer, args.chunks * (args.rounds + 1), args.chunk_tokens)
    times: dict[str, list[float]] = {"prefill": [], **{kind: [] for kind in args.lead_ins}}
    with tempfile.TemporaryDirectory() as folder:
        engines = {
            kind: CacheTune(model, tokenizer, Path(folder) / kind, codec=args.codec, lead_in=kind)
            for kind in args.lead_ins
        }
        prompts = engines[args.lead_ins[0]].prompts
        for round_ in range(args.rounds + 1):
            chunks = texts[round_ * args.chunks : (round_ + 1) * args.chunks]
            ids = [[prompts.first_token, *prompts.encode(c)] for c in chunks]

            @torch.no_grad()
            def prefill(ids: list[list[int]] = ids) -> None:
                for row in ids:
                    model(input_ids=torch.tensor([row], device=model.device), use_cache=True, logits_to_keep=1)

            document = Document(f"round-{round_}", chunks)
            work: dict[str, Callable[[], object]] = {"prefill": prefill}
            work |= {k: lambda e=e, d=document: e.precompute([d]) for k, e in engines.items()}
            # The one that runs first in a round finds colder caches, so they take turns.
            order = [*work][round_ % len(work) :] + [*work][: round_ % len(work)]
            took = {name: seconds(work[name]) for name in order}
            for name in took if round_ else ():  # the first round warms up, and chooses lead-ins
                times[name].append(took[name])
        counts = {kind: len(engine.lead_ins.namespace.lead_ins) for kind, engine in engines.items()}
        for engine in engines.values():
            engine.close()
    own = times.pop("prefill")
    rows = {
        kind: {
            "runs": counts[kind],
            "precompute": spread(took),
            "factor": statistics.median(t / o for t, o in zip(took, own, strict=True)),
        }
        for kind, took in times.items()
    }
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"}
    result = {"benchmark": "precompute", "environment": environment(), "settings": settings}
    write_json(args.out, {**result, "prefill": spread(own), "lead_ins": rows})
    for kind, row in rows.items():
        print(f"{kind}: {row['factor']:.2f} times the model's own prefill of the chunks", file=sys.stderr)


if __name__ == "__main__":
    main()
