"""The final round of the selection study (docs/selection.md); README.md beside this file says how to run it."""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from core import Base, Model, base_of, forward
from lib import Prompt, deviations, frequency
from torch import Tensor

COLUMNS = ["set", "record", "scheme", "ratio", "kl", "top1", "top1_first", "nll_difference", "compute"]
RATIOS = (0.02, 0.05, 0.10, 0.15, 0.30)
LEADS, LEAD_TOKENS = 8, 256


def plain(lam: float) -> dict[str, Any]:
    return {"mode": "plain", "lam": lam, "kappa": 2.0}


FITTED = {"mode": "sig", "lam": "ada", "kappa": 2.0}
SHIFTS: dict[str, dict[str, Any]] = {  # at 0.05 and 0.15, beside shift 0.4 at every ratio
    **{f"E+s{lam}": plain(lam) for lam in (0.3, 0.5)},
    **{f"E+sig{lam}": {"mode": "sig", "lam": lam, "kappa": 2.0} for lam in (0.5, 0.7)},
    "E+asig": FITTED,
    "E+asig*.8": {**FITTED, "factor": 0.8},
    **{f"E+kern{lam}": {"mode": "kernel", "lam": lam, "kappa": 1.0, "tau": 128.0} for lam in (0.35, 0.5)},
    "E+ivw.4": {"mode": "ivw", "lam": 0.4, "kappa": 2.0},
}


class Study:
    """The data with its fixed leads, and the rows measured so far."""

    def __init__(self, m: Model, data: dict[str, Any]):
        self.m, self.data, self.bos = m, data, data["BOS"]
        self.rows: list[list[Any]] = []
        data["shuf"] = [shuffled(i, record) for i, record in enumerate(data["docs"])]
        rng, self.leads = random.Random(5), {}
        for name in ("musique", "docs"):  # texts of the same corpus, from records that are never evaluated
            self.leads[name] = [lead(rng, data[name][-5:][i % 5]) for i in range(LEADS)]
        self.leads["shuf"] = self.leads["docs"]

    def run(self, name: str, index: int) -> None:
        """All schemes on one record."""
        record = self.data[name][index]
        prompt = Prompt(self.m, record, self.data["sysq" if name == "musique" else "sysd"])
        for base_name, base in self.bases(prompt, name, record).items():
            self.put(prompt, name, index, f"r0:{base_name}", 0, base, prompt.tail[:0], 0)
            self.schemes(prompt, name, index, base_name, base)

    def bases(self, prompt: Prompt, name: str, record: dict[str, Any]) -> dict[str, Base]:
        """Assembled KV by what the chunks were captured behind: BOS; the mean of 8 leads; own left context; both."""
        captures = [prompt.capture([self.bos, *text[: LEAD_TOKENS - 1]]) for text in self.leads[name]]
        keys, values = (sum(c[i] for c in captures) / LEADS for i in (0, 1))
        bases = {"bos": base_of(prompt, *prompt.capture([self.bos])), "mean8": base_of(prompt, keys, values)}
        deviations(self.m, bases["mean8"], captures)
        if name != "musique":
            left = prompt.capture_left(record, self.bos, 256)
            bases["left256"] = base_of(prompt, *left)
            bases["mix"] = base_of(prompt, (left[0] + keys) / 2, (left[1] + values) / 2)
            for base in (bases["left256"], bases["mix"]):
                base.sk, base.sv, base.sv_raw = bases["mean8"].sk, bases["mean8"].sv, bases["mean8"].sv_raw
        return bases

    def schemes(self, prompt: Prompt, name: str, index: int, base_name: str, base: Base) -> None:
        """Probe once, then recompute what each scheme selects; the probe's token-layers are taken out of the budget."""
        probe = forward(self.m, prompt, base, prompt.query, probe=True)
        mass, error = probe["attention"].mean(1).sum(0), (probe["ev"] + probe["ek"]).sum(0)

        def go(scheme: str, ratio: float, scores: Tensor, shift: dict[str, Any] | None = None) -> None:
            cost = prompt.queries * self.m.L
            picked = prompt.top(scores, math.floor((ratio * prompt.N * self.m.L - cost) / self.m.L))
            self.put(prompt, name, index, f"{base_name}:{scheme}", ratio, base, picked, cost, shift)

        for ratio in RATIOS:
            if base_name == "bos":
                go("mass", ratio, mass)
                if ratio in (0.05, 0.15, 0.30):
                    picked = prompt.top_per_chunk(frequency(prompt, base), ratio)
                    self.put(prompt, name, index, "bos:frequency", ratio, base, picked, 0)
                continue
            go("E+s.4", ratio, error, plain(0.4))
            if base_name != "mean8":
                continue
            go("E", ratio, error)
            if ratio in (0.05, 0.15):
                go("mass", ratio, mass)
                for scheme, shift in SHIFTS.items():
                    go(scheme, ratio, error, shift)

    def put(
        self,
        prompt: Prompt,
        name: str,
        index: int,
        scheme: str,
        ratio: float,
        base: Base,
        picked: Tensor,
        cost: int,
        shift: dict[str, Any] | None = None,
    ) -> None:
        """Recompute `picked` with query and target, and note a row of `COLUMNS`."""
        rows = torch.cat((picked.sort().values, prompt.tail))
        hidden = forward(self.m, prompt, base, rows, shift=shift)["hidden"]
        compute = (picked.numel() * self.m.L + cost) / (prompt.N * self.m.L)
        self.rows.append([name, index, scheme, ratio, *prompt.measure(hidden), round(compute, 5)])


def shuffled(seed: int, record: dict[str, Any]) -> dict[str, Any]:
    """All chunks but the last in another order."""
    chunks = record["chunks"]
    order = list(range(len(chunks) - 1))
    random.Random(seed).shuffle(order)
    order.append(len(chunks) - 1)
    return {**record, "chunks": [chunks[j] for j in order], "order": order, "original": chunks}


def lead(rng: random.Random, record: dict[str, Any]) -> list[int]:
    """A run of tokens from a record's chunks."""
    text = [x for chunk in record["chunks"] for x in chunk]
    length = min(600, len(text) - 1)
    start = rng.randrange(0, len(text) - length)
    return text[start : start + length]


def save(path: Path, rows: list[list[Any]]) -> None:
    """One row a line."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    head = {"benchmark": "selection_study", "torch": torch.__version__, "gpu": gpu, "columns": COLUMNS}
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(json.dumps(head)[:-1] + ', "rows": [\n' + lines + "\n]}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder in transformers' format")
    parser.add_argument("--data", type=Path, required=True, help="what prep.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--first", type=int, default=14, help="first record (those before it were used for tuning)")
    parser.add_argument("--musique", type=int, default=61, help="end of the records evaluated, exclusive")
    parser.add_argument("--docs", type=int, default=59)
    parser.add_argument("--shuf", type=int, default=26)
    parser.add_argument("--shard", type=int, default=0, help="this process takes every --shards-th record from here")
    parser.add_argument("--shards", type=int, default=1)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    study = Study(Model(args.model, args.device), json.loads(args.data.read_text()))
    ends = {"musique": args.musique, "docs": args.docs, "shuf": args.shuf}
    todo = [(name, i) for i in range(args.first, max(ends.values())) for name in ends if i < ends[name]]
    for name, index in todo[args.shard :: args.shards]:
        started = time.perf_counter()
        study.run(name, index)
        save(args.out, study.rows)
        print(name, index, f"{time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
