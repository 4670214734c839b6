"""Precompute on a Ray cluster of this machine with several numbers of actors: tokens per second, against the first number.

    python benchmarks/ray_precompute.py [--actors 1 2 4] [--out FILE]
    python benchmarks/ray_precompute.py --device cuda --actors 1 2 --hidden 2048 --layers 16 --documents 400 --dtype bfloat16

Without a model, a random one is used. An actor on a CPU computes with one thread, and all share this machine's cores: more actors than cores show nothing but that
they do no harm. With `--device cuda` each has a GPU. The clock runs from the moment at which every actor has done a row of work to that of the last row, so
the start of Ray and of the actors is left out, and the time in which the last actors have nothing to do any more is not.
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

sys.path.insert(0, str(Path(__file__).parent))
from common import environment, write_json

HEAD = 64


def random_model(folder: Path, hidden: int, layers: int) -> Path:
    """A random model of two key heads, so that it computes much and stores little."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import tiny
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def documents(count: int) -> list[dict[str, str]]:
    """Texts of the same length, of about 3,600 tokens of the random model."""
    draw = random.Random(5)
    return [{"id": f"d{i}", "text": " ".join(f"{draw.randrange(10**8):08d}" for _ in range(400))} for i in range(count)]


def measure(actors: int, model: Path, store: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Precompute all documents into a new store with so many actors."""
    seen: list[tuple[float, int]] = []

    def progress(done: Any) -> None:
        if done.workers == actors:
            seen.append((time.perf_counter(), done.tokens))

    rows = documents(given.documents)
    summary = cachetune_ray.precompute(
        ray.data.from_items(rows, override_num_blocks=2),
        model,
        store,
        actors=actors,
        work_tokens=given.work_tokens,
        device=given.device,
        dtype=given.dtype,
        progress=progress,
    )
    if len(seen) < 2:
        raise SystemExit(f"{summary.workers} of {actors} actors computed something: use more --documents.")
    seconds, tokens = (after - before for before, after in zip(seen[0], seen[-1], strict=True))
    return {
        "actors": actors,
        "tokens_per_second": tokens / seconds,
        "tokens_measured": tokens,
        "seconds_measured": seconds,
        "tokens": summary.tokens,
        "chunks": summary.chunks,
        "bytes": summary.bytes,
        "seconds": summary.seconds,
        "workers": summary.workers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="folder of a model (default: a random one)")
    parser.add_argument("--hidden", type=int, default=256, help="size of the random model's layers")
    parser.add_argument("--layers", type=int, default=8, help="how many it has")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--work-tokens", type=int, default=4096, help="tokens that are handed to an actor at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--folder", type=Path, help="where the stores are made (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="file for the JSON (default: standard output)")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        model = given.model or random_model(Path(folder) / "model", given.hidden, given.layers)
        ray.init(
            num_cpus=2 * max(given.actors) + 4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=200 << 20,
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = []
        for actors in given.actors:
            found = measure(actors, model, Path(folder) / f"kv{actors}", given)
            rows.append(found | {"scaling": found["tokens_per_second"] / (rows or [found])[0]["tokens_per_second"]})
            print(
                f"{actors} actors: {found['tokens_per_second']:,.0f} tokens/s, {rows[-1]['scaling']:.2f}x of the first; "
                f"{found['chunks']} chunks, {found['workers']} workers, {found['seconds']:.0f} s in all",
                file=sys.stderr,
                flush=True,
            )
        ray.shutdown()
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
    settings = {name: value for name, value in settings.items() if name not in ("out", "folder")}
    write_json(
        given.out,
        {
            "benchmark": "ray_precompute",
            "environment": environment() | {"ray": ray.__version__},
            "settings": settings,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
