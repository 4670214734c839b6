"""Precompute on a Ray cluster of this machine with 1, 2 and 4 actors: tokens per second, and what is computed twice where one is killed.

    python benchmarks/ray_precompute.py [--model PATH] [--actors 1 2 4]

Without a model, a random one of 8 layers is used. All actors share this machine's cores, so more actors than cores show nothing but that they do no harm.
The time is that from the first row of work that is done to the last: the start of Ray and of the actors is left out.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

import cachetune_ray


def random_model(folder: Path) -> Path:
    """A random model that is slow enough to be measured."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import tiny
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def documents(count: int) -> list[dict[str, str]]:
    draw = random.Random(5)
    return [{"id": f"d{i}", "text": " ".join(f"{draw.randrange(10**8)}" for _ in range(400))} for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--documents", type=int, default=40)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or random_model(Path(folder) / "model")
        ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        ray.data.DataContext.get_current().enable_progress_bars = False
        first = None
        for actors in given.actors:
            seen: list[tuple[float, int]] = []
            dataset = ray.data.from_items(documents(given.documents), override_num_blocks=2)

            def progress(done: Any, seen: list[tuple[float, int]] = seen) -> None:
                seen.append((time.perf_counter(), done.tokens))

            summary = cachetune_ray.precompute(
                dataset, model, Path(folder) / f"kv{actors}", actors=actors, work_tokens=4096, progress=progress
            )
            speed = (seen[-1][1] - seen[0][1]) / (seen[-1][0] - seen[0][0])
            first = first or speed
            print(
                f"{actors} actors: {speed:,.0f} tokens/s, {speed / first:.2f}x of the first; {summary.chunks} chunks, "
                f"{summary.workers} workers, {summary.seconds:.0f} s in all",
                flush=True,
            )
        ray.shutdown()


if __name__ == "__main__":
    main()
