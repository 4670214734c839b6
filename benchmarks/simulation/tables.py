"""The results of benchmarks/fleet.py as tables for docs/scale.md."""

from __future__ import annotations

from typing import Any

from simulation.sizes import CODECS, MODELS

RATES = (1_000, 10_000, 50_000)


def markdown(result: dict[str, Any]) -> str:
    """All tables."""
    parts = [_compared(result), _check(result), _rooms(result), _sizes(result), _bandwidth(result)]
    if result["sweeps"]:
        parts.insert(1, _sweeps(result))
    return "\n\n".join(parts)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _ms(figure: dict[str, float]) -> str:
    least, most = (f"{figure[key] * 1000:,.0f}" for key in ("least", "most"))
    return least if least == most else f"{least} to {most}"


def _percent(value: float) -> str:
    return f"{value:.0%}" if value >= 0.0995 or not value else f"{value:.1%}"


def _compared(result: dict[str, Any]) -> str:
    found = result["compared"]
    names = {"full": "full recompute", "in_turns": "reuse, replicas in turns", "by_chunks": "reuse, by chunks"}
    rows = []
    for name, words in names.items():
        each = found[name]
        hits = ["", "", "", ""] if name == "full" else [_percent(each["hits"][t]["mean"]) for t in each["hits"]]
        cost = each["cost"]
        rows.append(
            [
                words,
                *hits,
                _ms(each["ttft_median"]),
                _ms(each["ttft_p99"]),
                f"{cost['gpu_hours']:,.0f}",
                f"{cost['total']:,.0f}",
            ]
        )
    head = ["", "host memory", "disk", "remote", "nowhere", "TTFT median ms", "p99 ms", "GPU hours", "dollars"]
    parts = found["by_chunks"]["cost"]
    less = (
        f"Of the dollars by chunks: GPUs {parts['gpu']:,.0f}, requests to the remote tier {parts['reads']:,.0f}, its storage {parts['storage']:,.0f} "
        f"({found['stored_tb']:,.0f} TB), computing what changes {parts['precompute']:,.0f}. Computing the corpus once takes {found['precompute_hours']:,.0f} GPU hours. "
        f"Each replica reads {found['by_chunks']['network_gbps']:.1f} Gb/s from the remote tier on average ({found['in_turns']['network_gbps']:.1f} in turns). "
        f"The busiest replica got {found['by_chunks']['imbalance']:.2f} times the mean of requests. Host memory hit {_percent(found['by_chunks']['host_by_half'][0])} "
        f"in the first half of the requests and {_percent(found['by_chunks']['host_by_half'][1])} in the second. In turns, the approximation gives "
        f"{_percent(found['in_turns']['che']['host'])} from host memory and {_percent(found['in_turns']['che']['disk'])} from disk."
    )
    return f"{_table(head, rows)}\n\n{less}"


def _sweeps(result: dict[str, Any]) -> str:
    rows = []
    for name, each in {"as above": result["compared"], **result["sweeps"]}.items():
        full, reuse = each["full"], each["by_chunks"]
        late = reuse["busiest_network"] > 0.95 or reuse["load"] > 1
        busy = full["load"] > 1
        ttft = ["grows"] * 2 if late else [_ms(_mean(reuse[key])) for key in ("ttft_median", "ttft_p99")]
        plain = ["grows"] * 2 if busy else [_ms(_mean(full[key])) for key in ("ttft_median", "ttft_p99")]
        cheaper = "doesn't carry it" if late else f"{full['cost']['total'] / reuse['cost']['total']:.1f}x"
        rows.append(
            [
                name,
                _percent(reuse["hits"]["host"]["mean"]),
                _percent(reuse["hits"]["remote"]["mean"]),
                *ttft,
                *plain,
                f"{reuse['cost']['total']:,.0f}",
                f"{full['cost']['total']:,.0f}",
                cheaper,
            ]
        )
    return _table(
        [
            "changed",
            "host memory",
            "remote",
            "TTFT median ms",
            "p99 ms",
            "full: median ms",
            "p99 ms",
            "dollars",
            "full: dollars",
            "cheaper",
        ],
        rows,
    )


def _mean(figure: dict[str, float]) -> dict[str, float]:
    return {"least": figure["mean"], "most": figure["mean"]}


def _check(result: dict[str, Any]) -> str:
    caches = [
        [f"{row['chunks']:,}", f"{row['room']:,}", f"{row['exact']:.1%}", f"{row['che']:.1%}"]
        for row in result["check"]["caches"]
    ]
    queue = [
        [
            "full recompute" if row["full"] else "reuse",
            f"{row['rate']:.2f}",
            *(f"{row[key] * 1000:,.0f}" for key in ("measured_median", "median", "measured_p99", "p99")),
        ]
        for row in result["check"]["queue"]
    ]
    return "\n\n".join(
        [
            _table(["chunks", "room", "simulated", "approximation"], caches),
            _table(
                ["one replica", "requests/s", "TTFT median ms, measured", "simulated", "p99 ms, measured", "simulated"],
                queue,
            ),
        ]
    )


def _rooms(result: dict[str, Any]) -> str:
    rows = [[f"{row['gigabytes']:,}", _percent(row["alone"]), _percent(row["together"])] for row in result["rooms"]]
    return _table(["GB a replica", "replicas in turns", "if no two replicas held the same"], rows)


def _sizes(result: dict[str, Any]) -> str:
    rows = [
        [MODELS[model][0], *(f"{sizes[codec]:.1f}" for codec in CODECS), f"{sizes['deviations']:.2f}"]
        for model, sizes in result["sizes"].items()
    ]
    return _table(["GB a million tokens", *(f"`{codec}`" for codec in CODECS), "deviations"], rows)


def _bandwidth(result: dict[str, Any]) -> str:
    rows = []
    for model, sizes in result["sizes"].items():
        rows += [
            [MODELS[model][0], f"`{codec}`", *(f"{rate * sizes[codec] * 1000 * 8 / 1e9:.2f}" for rate in RATES)]
            for codec in ("exact", "int4")
        ]
    return _table(["Gb/s a replica", "codec", *(f"{rate:,} tokens/s" for rate in RATES)], rows)
