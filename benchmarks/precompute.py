"""What precompute costs beyond the model's own prefill of the same chunks (ranking, encoding, writing, syncing).

python benchmarks/precompute.py --out benchmarks/results/precompute-cpu.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from common import environment, real_chunks, seconds, spread, write_json
from smollm2 import model_path

from cachetune_rag import CacheTune, Document
from cachetune_rag.loading import load_model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="folder of a model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--chunks", type=int, default=8, help="chunks a round")
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--codec", default="exact")
    parser.add_argument("--lead-in", default="first_token", choices=("first_token", "auto"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="file for the JSON (default: standard output)")
    args = parser.parse_args()

    model, tokenizer = load_model(args.model or model_path())
    texts = real_chunks(tokenizer, args.chunks * (args.rounds + 1), args.chunk_tokens)
    own, job = [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        CacheTune(model, tokenizer, folder, codec=args.codec, lead_in=args.lead_in) as engine,
    ):
        for round_ in range(args.rounds + 1):
            chunks = texts[round_ * args.chunks : (round_ + 1) * args.chunks]
            ids = [[engine.prompts.first_token, *engine.prompts.encode(c)] for c in chunks]

            @torch.no_grad()
            def prefill(ids: list[list[int]] = ids) -> None:
                for row in ids:
                    model(input_ids=torch.tensor([row], device=model.device), use_cache=True, logits_to_keep=1)

            def precompute(round_: int = round_, chunks: list[str] = chunks) -> None:
                engine.precompute([Document(f"round-{round_}", chunks)])

            # Whichever runs first in a round finds colder caches: take turns.
            order = (prefill, precompute) if round_ % 2 else (precompute, prefill)
            took = {work: seconds(work) for work in order}
            if round_:  # the first round warms up
                own.append(took[prefill])
                job.append(took[precompute])
    ratios = [j / o for j, o in zip(job, own, strict=True)]
    result = {"prefill": spread(own), "precompute": spread(job), "overhead": statistics.median(ratios) - 1}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"}
    write_json(args.out, {"benchmark": "precompute", "environment": environment(), "settings": settings, **result})
    print(f"precompute takes {result['overhead']:+.1%} over the model's own prefill", file=sys.stderr)


if __name__ == "__main__":
    main()
