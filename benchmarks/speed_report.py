"""Tables and plots of what `ttft_gpu.py` measured.

    python benchmarks/speed_report.py benchmarks/results/ttft-h100*.json --readme docs/speed.md --docs docs/performance-results.md \\
        --plot benchmarks/results

Without --readme and --docs it prints the tables. The short table and the plots are made of the first file, and so is the table that says where the time goes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from speed.report import brief, details, put_between


def main(arguments: list[str] | None = None) -> None:
    """Write or print the tables, and draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("files", type=Path, nargs="+", help="JSON of ttft_gpu.py")
    parser.add_argument("--readme", type=Path, help="file whose short table is replaced")
    parser.add_argument("--docs", type=Path, help="file whose results are replaced")
    parser.add_argument("--plot", type=Path, help="folder for the plots")
    args = parser.parse_args(arguments)

    contents = [json.loads(path.read_text()) for path in args.files]
    tables = [details(content, times=number == 0) for number, content in enumerate(contents)]
    short, long = brief(contents[0]), "\n\n".join(["## Results", *tables])
    if args.readme is not None:
        put_between(args.readme, short)
    if args.docs is not None:
        put_between(args.docs, long)
    if args.readme is None and args.docs is None:
        print(short, long, sep="\n\n")
    if args.plot is not None:
        from speed.plot import plot

        for path in plot(contents[0], args.plot, args.files[0].stem):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
