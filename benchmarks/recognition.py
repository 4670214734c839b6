"""How long it takes to find the stored chunks in a long plain prompt.

    python benchmarks/recognition.py --out benchmarks/results/recognition-cpu.json

130,000 characters are about 32k tokens. In the second case all chunks begin with the same header, as a framework's metadata
makes them, so that many places look alike at first.
"""

from __future__ import annotations

import argparse
import random
import string
import sys
from functools import partial
from pathlib import Path

from common import environment, seconds, spread, write_json

from cachetune_rag.prompt import Chunk
from cachetune_rag.recognition import ChunkRecognizer

HEADERS = {"no header": "", "shared header": "file_path: /data/documents/handbook.txt\ntitle: The handbook\n\n"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--chunks", type=int, default=100_000, help="stored chunks")
    parser.add_argument("--characters", type=int, default=130_000, help="length of the prompt")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, help="file for the JSON (default: standard output)")
    args = parser.parse_args()

    rows = []
    for name, header in HEADERS.items():
        rng = random.Random(9)
        vocabulary = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(3000)]
        texts = [header + " ".join(rng.choices(vocabulary, k=rng.randint(100, 400))) for _ in range(1000)]
        recognizer = ChunkRecognizer()
        recognizer.update(enumerate(texts))
        recognizer.update((i, f"{header}{i:06d} {texts[i % 1000][len(header) :]}") for i in range(1000, args.chunks))
        prompt = "\n\n".join(rng.choice(texts) for _ in range(200))[: args.characters] + "\nQuestion: what?"
        found = sum(isinstance(s, Chunk) for s in recognizer.segment(prompt))
        took = [seconds(partial(recognizer.segment, prompt)) for _ in range(args.rounds)]
        rows.append({"case": name, "found": found, "seconds": spread(took)})
        print(f"{name}: {found} chunks found in {rows[-1]['seconds']['median'] * 1e3:.1f} ms (median)", file=sys.stderr)
    settings = {"chunks": args.chunks, "characters": args.characters, "rounds": args.rounds}
    write_json(args.out, {"benchmark": "recognition", "environment": environment(), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
