"""Arguments that the benchmarks of answers have in common: the model, several processes, and where results go."""

from __future__ import annotations

import argparse
from pathlib import Path

from common import ROOT, environment

BUILD = ROOT / "build"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it runs."""
    parser.add_argument("--model", type=Path, help="folder of a model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--gguf-file", help="name of a GGUF file in that folder")
    parser.add_argument("--name", help="what to call the model in the results")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tf32", action="store_true", help="on a GPU, multiply matrices in TF32")
    parser.add_argument("--cuda-kernels", action="store_true", help="on a GPU, through the package's kernels")
    parser.add_argument("--commit", help="what to record where there is no git")


def add_shards(parser: argparse.ArgumentParser) -> None:
    """Which part of the work this process does."""
    shards = parser.add_argument_group("several processes on one machine, each with the same arguments but --shard")
    shards.add_argument("--shard", type=int, default=0)
    shards.add_argument("--shards", type=int, default=1)


def finish(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str) -> None:
    """Refuse a shard that isn't there and ratios that aren't shares; without --out, results go to a folder of this commit."""
    if not 0 <= args.shard < args.shards:
        parser.error(f"--shard is {args.shard}: use 0 to {args.shards - 1}, with --shards {args.shards}.")
    if any(not 0 <= r <= 1 for r in args.ratios):
        parser.error(f"--ratios are {args.ratios}: use numbers from 0 to 1.")
    if args.out is None:
        commit = args.commit or environment()["commit"]
        args.out = BUILD / f"{name}-{'quick-' if args.quick else ''}{commit}"
