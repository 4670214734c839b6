"""Answers of two models to the same questions, in pairs: what `quality.py --answers` wrote into two folders; see docs/quality-reader.md.

python benchmarks/reader/compare.py --before FOLDER --after FOLDER
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from fidelity.answers_report import changes
from fidelity.report import load


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--before", type=Path, required=True, metavar="FOLDER", help="results of the one model")
    parser.add_argument("--after", type=Path, required=True, metavar="FOLDER", help="results of the other")
    args = parser.parse_args(argv)
    try:
        (before, first), (after, second) = load(args.before), load(args.after)
        print(
            f"Before: {before['model']}, commit {before['commit']}. After: {after['model']}, commit {after['commit']}.\n"
        )
        print(changes(first, second), end="")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
