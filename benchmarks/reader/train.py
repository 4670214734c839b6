"""Fine-tune a small model to read many passages; see docs/quality-reader.md.

    python benchmarks/reader/train.py --musique musique_ans_v1.0_dev.jsonl --squad train-v1.1.json --seconds 300 --out ADAPTER
    torchrun --nproc-per-node 4 benchmarks/reader/train.py --musique FILE --seconds 300 --out ADAPTER

What it writes is a LoRA adapter in PEFT's format, which merge.py adds to the model's weights; with --full, a model of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from common import environment
from fidelity.musique import read_questions
from smollm2 import model_path
from tasks_of.haystack import reference_sentences
from tasks_of.kinds import planted_words

from cachetune_rag.answering.decoding import prepare
from cachetune_rag.model.loading import load_model
from reader.batches import SHARES, Batch, Batches, Encoder
from reader.contexts import ContextMaker
from reader.lora import add_lora, save_adapter
from reader.prose import RealQuestion, docstring_sentences, further_questions, passage_sentences, split_musique
from reader.squad import AskedPassage, Barred, read_squad
from reader.turns import STEP

WARM_UP = 0.03
"""Share of the training in which the rate rises. It falls in the rest, to zero."""
RANK, ALPHA = 12, 24.0
"""Of an adapter, where nothing else is asked for."""
REAL, READ = 0.04, 0.4
"""Shares of contexts with real questions, and of the others with passages that have questions of their own, where nothing else is asked for."""
HELD_OUT = 8
"""Batches that are not trained on, for the loss before and afterwards."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and write the adapter or the model."""
    args = arguments(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = args.device
    if world > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    model, tokenizer = load_model(args.model or model_path(), device=device, dtype="float32")
    split = split_musique(args.musique) if args.musique else None
    questions = [] if split is None else list(split.trained)
    further, passages = further_text(args, () if split is None else split.kept)
    questions += further
    sentences = [*docstring_sentences(), *passage_sentences(questions)]
    # Nothing is called here as anything is in the benchmark of tasks, neither what it plants nor a word of its prose.
    avoid = planted_words() | set(re.findall(r"\w+", " ".join(reference_sentences()).casefold()))
    maker = ContextMaker(sentences, questions, avoid, args.real, passages, args.read, args.seed, args.aloud)
    held = ContextMaker(sentences, questions, avoid, 0.0, seed=args.seed + 1, aloud=args.aloud)
    check_end(model, tokenizer)
    layers = None if args.full else add_lora(model, args.rank, args.alpha, args.seed)
    # The same batches for every process: what is held out is a yardstick, not a share of the work.
    yardstick = list(
        islice(iter(Batches(held, tokenizer, args.tokens // 4, args.lengths, shares=args.shares)), HELD_OUT)
    )
    batches = Batches(maker, tokenizer, args.tokens, args.lengths, rank, world, shares=args.shares)
    loader = DataLoader(batches, batch_size=None, num_workers=args.workers, prefetch_factor=4 if args.workers else None)
    log = Log(args.out / "log.jsonl" if rank == 0 else None)
    with closing(log):
        log.write(
            {
                "arguments": {k: str(v) for k, v in vars(args).items()},
                "processes": world,
                "held_out_questions": None if split is None else {"first": split.first, "count": split.count},
                "further_questions": len(further),
                "passages_with_questions": [len(passages), sum(len(p.asked) for p in passages)],
                "commit": args.commit,
                "environment": environment(),
            }
        )
        before = mean_loss(model, yardstick)
        done = train(model, iter(loader), args.rate, log, seconds=args.seconds, steps=args.steps)
        log.write({**done, "held_out_before": before, "held_out": mean_loss(model, yardstick)})
    if rank == 0:
        if layers is None:
            model.save_pretrained(args.out)
            tokenizer.save_pretrained(args.out)
        else:
            save_adapter(layers, args.out, args.name or Path(model.config.name_or_path).name)
        print(args.out, flush=True)
        if split is not None:
            print(
                f"held out: quality.py --musique {args.musique} --first {split.first} --musique-records {split.count}",
                flush=True,
            )
    if world > 1:
        dist.destroy_process_group()


def further_text(args: argparse.Namespace, measured: Iterable[str]) -> tuple[list[RealQuestion], list[AskedPassage]]:
    """The questions of `--more` and the passages of `--squad`, without passages like those that are measured on: `measured`, and those of `--barred`."""
    others = [passage for file in args.barred for asked in read_questions(file) for passage in asked.passages]
    barred = Barred([*measured, *others])
    further = [question for file in args.more for question in further_questions(file, barred)]
    return further, read_squad(args.squad, barred) if args.squad else []


def check_end(model: Any, tokenizer: Any) -> None:
    """Refuse a model that doesn't stop at the token by which its answers will end."""
    end = Encoder(tokenizer).end
    stops = prepare(model, tokenizer, [end], max_new_tokens=1).eos_ids
    if end not in stops:
        sys.exit(
            f"the chat template ends an answer with token {end} ({tokenizer.decode([end])!r}), and the model stops at {sorted(stops)}: its answers would "
            "run on. Set eos_token_id in the model's generation_config.json."
        )


def train(
    model: nn.Module,
    batches: Iterator[Batch],
    rate: float,
    log: Log,
    seconds: float = float("inf"),
    steps: int | None = None,
) -> dict[str, Any]:
    """Train what isn't frozen, for so long or so many steps, and return how much was done.

    Several processes each give their own batches and take one step together.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    model.train()
    started, step, tokens, progress = time.monotonic(), 0, 0, 0.0
    recent: list[float] = []
    while progress < 1:
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(progress / WARM_UP if step else 0.01, (1 - progress) / (1 - WARM_UP))
        loss = loss_of(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        elapsed = max((time.monotonic() - started) / seconds, (step + 1) / steps if steps else 0.0)
        mean, progress = together(weights, loss.item(), elapsed)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step, tokens = step + 1, tokens + batch.ids.numel()
        recent.append(mean)
        if step % 20 == 0:
            log.write(
                {
                    "step": step,
                    "progress": round(progress, 4),
                    "loss": sum(recent) / len(recent),
                    "tokens_per_second": round(tokens / (time.monotonic() - started)),
                }
            )
            recent.clear()
    model.eval()
    return {"steps": step, "tokens_of_a_process": tokens, "seconds": round(time.monotonic() - started, 1)}


def loss_of(model: Any, batch: Batch) -> Tensor:
    """The mean loss of a batch's learned tokens. Logits are computed for those alone: a vocabulary times all tokens would not fit."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        hidden = model.get_decoder()(input_ids=batch.ids.to(device), use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden.flatten(0, 1)[batch.at.to(device)])
    return cross_entropy(logits.float(), batch.wanted.to(device))


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The mean loss over batches, of which each counts the same."""
    model.eval()
    return sum(loss_of(model, batch).item() for batch in batches) / len(batches)


def together(weights: Sequence[nn.Parameter], loss: float, progress: float) -> tuple[float, float]:
    """Make the gradients of all processes their mean, and return the mean loss and progress, so that all stop at the same step."""
    if not dist.is_initialized():
        return loss, progress
    grads = [p.grad for p in weights if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in grads), grads[0].new_tensor([loss, progress])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, part in zip(grads, flat[:-2].split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))
    mean, progress = flat[-2:].tolist()
    return mean, progress


class Log:
    """Lines of JSON, for a file and for the screen. Without a file, it is silent."""

    def __init__(self, path: Path | None):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = None if path is None else path.open("w")

    def write(self, line: dict[str, Any]) -> None:
        """Write a line. It is on disk when this returns."""
        if self._file is not None:
            text = json.dumps(line)
            self._file.write(text + "\n")
            self._file.flush()
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter, or for the model")
    parser.add_argument("--model", type=Path, help="folder of a model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--name", help="what the adapter calls its model (default: the folder's name)")
    parser.add_argument("--musique", type=Path, metavar="FILE", help="questions, of which the first half is trained on")
    parser.add_argument(
        "--more",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="further questions in MuSiQue's form, all trained on",
    )
    parser.add_argument("--real", type=float, help="share of contexts with all those questions (default: 0.04)")
    parser.add_argument("--squad", type=Path, metavar="FILE", help="passages with questions on each, in SQuAD's form")
    parser.add_argument("--read", type=float, help="share of the other contexts with those passages (default: 0.4)")
    parser.add_argument(
        "--barred",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="questions in MuSiQue's form that are measured on: passages like theirs are left out of --more and --squad",
    )
    parser.add_argument(
        "--aloud",
        action="store_true",
        help=f"answer questions of several steps by what they go through, each behind {STEP!r}, and then the answer",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=300.0, help="of training; its rate falls with what is left")
    parser.add_argument("--steps", type=int, help="end after so many steps, if that is earlier")
    parser.add_argument(
        "--full", action="store_true", help="train all weights, not an adapter, and write a whole model"
    )
    parser.add_argument("--rank", type=int, default=RANK, help="of the adapter")
    parser.add_argument("--alpha", type=float, default=ALPHA)
    parser.add_argument("--rate", type=float, help="the highest learning rate (default: 1e-3, and 3e-4 with --full)")
    parser.add_argument("--tokens", type=int, default=32768, help="about how many tokens a batch has")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(SHARES), choices=list(SHARES), help="of prompts")
    parser.add_argument("--shares", type=float, nargs="+", help="of steps with each of these lengths")
    parser.add_argument("--workers", type=int, default=8, help="processes that make text, for each GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="what to record where there is no git")
    args = parser.parse_args(argv)
    for name in ("rank", "tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}: use 1 or more.")
    if args.shares is not None and (
        len(args.shares) != len(args.lengths) or min(args.shares) < 0 or not sum(args.shares)
    ):
        parser.error(f"--shares is {args.shares} with --lengths {args.lengths}: give one share for each, none below 0.")
    if args.full and ((args.rank, args.alpha) != (RANK, ALPHA) or args.name):
        parser.error("--full trains no adapter: leave out --rank, --alpha and --name.")
    if args.barred and not (args.more or args.squad):
        parser.error(
            "--barred leaves passages out of --more and --squad, and neither is given: give one, or leave it out."
        )
    if args.real is not None and not (args.musique or args.more):
        parser.error(
            f"--real is {args.real}, and there are no such questions: give --musique or --more, or leave it out."
        )
    if args.read is not None and not args.squad:
        parser.error(f"--read is {args.read}, and there are no such passages: give --squad, or leave it out.")
    for name, share in (("real", REAL), ("read", READ)):
        if getattr(args, name) is None:
            setattr(args, name, share)
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} is {getattr(args, name)}: use a share from 0 to 1.")
    if args.rate is None:
        args.rate = 3e-4 if args.full else 1e-3
    return args


if __name__ == "__main__":
    main()
