"""What the page's template is filled with, besides the explanation itself: sums, and the sizes of what it draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cachetune_rag.explaining.explanation import ExplainedAnswer, ExplainedChunk, Explanation, Part
from cachetune_rag.explaining.figures import count, nats, seconds, share

MEANINGS = {
    "computed": "outside of chunks; went through the model",
    "kept": "at the beginning; taken over from an earlier prompt that begins alike",
    "reused": "in a stored chunk; its stored rows were used",
    "recomputed": "in a stored chunk; its stored rows were read, and computed again",
    "skipped": "in a stored chunk; computed again, and its stored rows were not even read",
    "missed": "in a chunk that is not in the store; went through the model",
}
PHASES = {
    "lookup": "finding and opening the chunks",
    "select": "choosing which tokens to recompute",
    "load": "putting reused rows in their places",
    "compute": "the forward over the computed tokens",
    "launch": "waiting for the GPU to begin, and to be seen done",
    "choose": "choosing the first token",
    "read_again": "reading the prompt again without reuse",
    "rest": "everything else",
}
COLUMNS = 400
"""Columns of the map of the prompt; each is a share of its tokens."""


@dataclass(frozen=True)
class Piece:
    """A piece of a drawn bar, in thousandths of its width."""

    name: str
    x: float
    width: float
    value: float


@dataclass(frozen=True)
class View:
    """See the module.

    Attributes:
        counts: tokens by fate, those that occur.
        bar: the same as a bar.
        tiles: name, figure and a line below it.
        map: of the prompt: by fate, the path of its columns.
        places: of the prompt's parts on the map: the part, its number, x and width.
        chunks: by their numbers. Those that a server had in its prefix cache are missing.
        titles: heading of each part.
        usual: of each part, the fate that most of its tokens have.
        times: name, bar, pieces and total of each prefill.
        same: how many characters both answers begin with; None without two answers.
        kl_most: the largest KL of an answer's token.
    """

    counts: dict[str, int]
    bar: list[Piece]
    tiles: list[tuple[str, str, str]]
    map: dict[str, str]
    places: list[tuple[Part, int, float, float]]
    chunks: dict[int, ExplainedChunk]
    titles: list[str]
    usual: list[str]
    times: list[tuple[str, list[Piece], float]]
    same: int | None
    kl_most: float
    meanings: dict[str, str]
    phases: dict[str, str]


def view_of(e: Explanation) -> View:
    """What a page shows of an explanation."""
    counts = counts_of(e)
    total = max(1, sum(counts.values()))
    times = [
        (name, answer) for name, answer in (("With reuse", e.reuse), ("Full prefill", e.full)) if answer is not None
    ]
    longest = max((_total(answer) for _, answer in times), default=0.0)
    return View(
        counts=counts,
        bar=_bar(counts, total),
        tiles=_tiles(e, counts, total),
        map=_map(e.parts),
        places=_places(e.parts),
        chunks={chunk.number: chunk for chunk in e.chunks},
        titles=[_title(part, e) for part in e.parts],
        usual=[max((run.fate for run in part.runs), key=part.count) for part in e.parts],
        times=[(name, _bar(_phases(a), longest or 1), _total(a)) for name, a in times if _total(a)],
        same=_same(e.reuse, e.full),
        kl_most=max((token.kl for token in e.divergence.tokens), default=0.0) if e.divergence else 0.0,
        meanings=MEANINGS,
        phases=PHASES,
    )


def counts_of(e: Explanation) -> dict[str, int]:
    """Tokens by fate, in the order of `MEANINGS`: by the parts, or by the report where those aren't known."""
    if e.parts:
        found = {fate: e.count(fate) for fate in MEANINGS}
    else:
        said = {
            name: int(e.report.get(name, 0)) for name in ("prompt_tokens", "reused", "recomputed", "missed", "skipped")
        }
        kept = int(e.report.get("prefix_kept", 0))
        outside = said["prompt_tokens"] - said["reused"] - said["recomputed"] - said["missed"] - kept
        found = {
            "computed": max(0, outside), "kept": kept, "reused": said["reused"],
            "recomputed": said["recomputed"] - said["skipped"], "skipped": said["skipped"], "missed": said["missed"],
        }  # fmt: skip
    return {fate: number for fate, number in found.items() if number}


def _tiles(e: Explanation, counts: dict[str, int], total: int) -> list[tuple[str, str, str]]:
    spared = counts.get("reused", 0) + counts.get("kept", 0)
    tiles = [("Not computed", share(spared / total), f"{count(spared)} of {count(total)} tokens")]
    if e.chunks:
        stored = sum(chunk.outcome == "stored" for chunk in e.chunks)
        tiles.append(("Chunks found", f"{stored} of {len(e.chunks)}", _tiers(e)))
    ttft = e.report.get("ttft")
    if ttft and e.source == "server":
        tiles.append(("Put together in", seconds(ttft), "its time in vLLM's queue is not among it"))
    elif ttft:
        below = "no full prefill to compare with"
        if e.full is not None and e.full.ttft:
            times = e.full.ttft / ttft
            speed = f"{times:.1f} times sooner" if times >= 1 else f"{1 / times:.1f} times later"
            below = f"full prefill: {seconds(e.full.ttft)}, so {speed}"
        tiles.append(("First token after", seconds(ttft), below))
    if e.divergence is not None:
        d = e.divergence
        below = f"{nats(d.first_kl)} at the first token; same likeliest token at {share(d.top1)}"
        tiles.append(("KL a token", nats(d.mean_kl), below))
    elif e.predicted is not None and e.predicted.left:
        tiles.append(("Expected error left", share(e.predicted.left), "of that without recomputing (predicted)"))
    return tiles


def _tiers(e: Explanation) -> str:
    tiers = dict.fromkeys(f"{chunk.tier}, {chunk.codec}" for chunk in e.chunks if chunk.tier)
    return f"from {'; '.join(tiers)}" if tiers else "none of them is stored"


def _title(part: Part, e: Explanation) -> str:
    if part.kind != "chunk":
        before = "Before the chunks" if e.chunks else "The whole prompt"
        return {"prefix": before, "between": "Between two chunks", "query": "Behind the chunks: the query"}[part.kind]
    assert part.chunk is not None
    document = next((chunk.document for chunk in e.chunks if chunk.number == part.chunk), None)
    return f"Chunk {part.chunk + 1}{f': {document}' if document else ''}"


def _bar(amounts: dict[str, Any], total: float) -> list[Piece]:
    pieces, x = [], 0.0
    for name, amount in amounts.items():
        width = 1000 * amount / total
        pieces.append(Piece(name, round(x, 2), round(width, 2), amount))
        x += width
    return pieces


def _total(answer: ExplainedAnswer) -> float:
    return max(answer.ttft or 0.0, sum(answer.timings.values()))


def _phases(answer: ExplainedAnswer) -> dict[str, float]:
    known = {name: value for name, value in answer.timings.items() if name in PHASES and value > 0}
    rest = _total(answer) - sum(known.values())
    return {**known, "rest": rest} if rest > 0 else known


def _places(parts: Sequence[Part]) -> list[tuple[Part, int, float, float]]:
    total = max(1, sum(part.tokens for part in parts))
    return [
        (part, number, round(1000 * part.start / total, 2), round(1000 * part.tokens / total, 2))
        for number, part in enumerate(parts)
        if part.kind == "chunk"
    ]


def _map(parts: Sequence[Part]) -> dict[str, str]:
    """By fate, an SVG path: in every column, a bar as high as the share of the column's tokens that have the fate."""
    runs = [run for part in parts for run in part.runs]
    total = sum(run.tokens for run in runs)
    if not total:
        return {}
    columns = min(COLUMNS, total)
    shares = {fate: [0.0] * columns for fate in MEANINGS}
    at = 0.0
    for run in runs:
        end = at + run.tokens * columns / total
        column = int(at)
        while column < min(columns, end):
            shares[run.fate][column] += min(end, column + 1) - max(at, column)
            column += 1
        at = end
    paths: dict[str, list[str]] = {}
    width = 1000 / columns
    for column in range(columns):
        y = 0.0
        for fate, of_fate in shares.items():
            if (height := 100 * of_fate[column]) > 0.05:
                paths.setdefault(fate, []).append(
                    f"M{column * width:.4g} {y:.3g}h{width:.4g}v{height:.3g}h-{width:.4g}z"
                )
            y += height
    return {fate: "".join(path) for fate, path in paths.items()}


def _same(one: ExplainedAnswer | None, other: ExplainedAnswer | None) -> int | None:
    if one is None or other is None or one.text is None or other.text is None:
        return None
    least = min(len(one.text), len(other.text))
    return next((at for at in range(least) if one.text[at] != other.text[at]), least)
