"""Tables of the selection study: python table.py RESULT.json ..."""

from __future__ import annotations

import collections
import json
import random
import sys
from pathlib import Path

RATIOS = (0, 0.02, 0.05, 0.10, 0.15, 0.30)
HEAD = "| scheme | r | compute | KL | share closed [95%] | top-1 all | top-1 first | NLL diff |"


def main() -> None:
    rows = [row for path in sys.argv[1:] for row in json.loads(Path(path).read_text())["rows"]]
    nothing = {(row[0], row[1]): row[4] for row in rows if row[2] == "r0:bos"}
    cells: dict[tuple[str, str, float], list[tuple[float, ...]]] = collections.defaultdict(list)
    for name, index, scheme, ratio, *values in rows:
        cells[name, scheme, ratio].append((nothing[name, index], *values))
    rng = random.Random(0)
    for name in ("musique", "docs", "shuf"):
        base = [kl for (where, _), kl in nothing.items() if where == name]
        if not base:
            continue
        print(f"\n### {name}: n = {len(base)}, KL(0) = {sum(base) / len(base):.4f}\n\n{HEAD}\n{'| --- ' * 8}|")
        for scheme in dict.fromkeys(scheme for where, scheme, _ in cells if where == name):
            for ratio in RATIOS:
                if cell := cells.get((name, scheme, ratio)):
                    _, kl, top1, first, nll, compute = (sum(column) / len(cell) for column in zip(*cell, strict=True))
                    # resample records; the share is a ratio of sums, so records with a large gap weigh more
                    drawn = sorted(share(rng.choices(cell, k=len(cell))) for _ in range(1000))
                    print(
                        f"| {scheme} | {ratio:g} | {compute:.4f} | {kl:.4f} | {100 * share(cell):.1f} "
                        f"[{100 * drawn[25]:.0f}, {100 * drawn[975]:.0f}] | {top1:.3f} | {first:.3f} | {nll:+.4f} |"
                    )


def share(cell: list[tuple[float, ...]]) -> float:
    """Share of the KL of "nothing recomputed" that is gone."""
    return 1 - sum(c[1] for c in cell) / sum(c[0] for c in cell)


if __name__ == "__main__":
    main()
