"""A run measures group after group, the most important first, until the time is over."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cachetune_rag.report import Report
from cachetune_rag.reuse.config import ReuseConfig

from .machine import synchronize
from .plan import Group, Setting
from .results import Results
from .rounds import Samples, Way, rounds
from .subject import QUERY, Subject

FULL, ENGINE = "full", "engine full"
_PREFIX = {"prefix caching, same order": 1, "prefix caching, other order": -1}
_KVBOOST = "kvboost cacheblend"
_FAILURES = 3
"""How many groups in a row may fail before the run ends. By then the device can't be used any more."""


class Run:
    """Measures groups on one subject into one file.

    Args:
        subject: model, engine and stores.
        results: keeps the rows.
        count: how many rounds count.
        full_rounds: how many rounds of full prefill there are, if fewer.
        until: time.perf_counter() at which the run ends.
        trace: file for the profiler's trace of the phase "timeline".
        tell: called with a line of text now and then.
    """

    def __init__(
        self,
        subject: Subject,
        results: Results,
        count: int,
        full_rounds: int | None,
        until: float,
        trace: Path | None,
        tell: Callable[[str], None],
    ):
        self._subject, self._results, self._count, self._until = subject, results, count, until
        self._full_rounds, self._trace, self._tell = full_rounds, trace, tell
        before = [g for g in results.content["groups"].values() if "full" in g]
        # Seconds of full prefill by context, from which a group's time is estimated; and the contexts where the engine's own was timed.
        self._full: dict[int, float] = {g["context"]: g["full"]["median"] for g in before}
        self._checked = {g["context"] for g in before if "engine_full" in g}

    def groups(self, groups: list[Group]) -> None:
        """Measure the groups in order. Those that don't fit into the remaining time are left out."""
        failures = 0
        for group in groups:
            left = self._until - time.perf_counter()
            if self._results.done(group.name, self._count):
                continue
            if left <= 0 or self._guess(group) > left:
                self._tell(f"left out for lack of time: {group.name}")
                continue
            try:
                self._group(group)
                failures = 0
            except Exception as error:  # whatever the reason, the other groups are still measured
                failures += 1
                self._tell("".join(traceback.format_exception(error)))
                note = {"phase": group.phase, "context": group.context, "error": f"{type(error).__name__}: {error}"}
                self._results.put(group.name, {**note, "rounds": 0, "rows": []})
                with suppress(RuntimeError):
                    torch.cuda.empty_cache()
            if failures == _FAILURES:
                raise RuntimeError(f"{failures} groups in a row failed: is the device lost?")
            self._results.content["machine"]["seconds"] = self._subject.timings
            self._results.write()

    def _guess(self, group: Group) -> float:
        """An estimate of a group's seconds, from full prefill of its context or of the nearest one."""
        if not self._full:
            return 0.0
        nearest = min(self._full, key=lambda c: abs(c - group.context))
        full = self._full[nearest] * group.context / nearest
        before = sum(18 * full for s in group.settings if s.ratio is None)
        if group.settings and not self._subject.stored(group.codec):
            before += self._subject.timings.get("precompute exact", 0.0)
        return before + full * self._count * (10 if group.phase == "kvboost" else 1 + 0.2 * len(group.settings))

    def _group(self, group: Group) -> None:
        subject = self._subject
        if group.settings:
            subject.store(group.codec, group.tier)
        if group.phase == "timeline":
            self._timeline(group)
            return
        ways, configs = self._ways(group)
        rarely = {} if self._full_rounds is None else {FULL: self._full_rounds}
        graphs = _captures(subject)
        for number, found in enumerate(rounds(ways, self._count, subject.device, self._until, rarely), 1):
            if number == 1:
                graphs = _captures(subject)
            self._full[group.context] = found[FULL].median()
            rows = [self._row(group, name, found, configs.get(name)) for name in ways if name not in (FULL, ENGINE)]
            record = {
                "phase": group.phase, "context": group.context, "tier": group.tier, "codec": group.codec, "rounds": number,
                "prompt_tokens": len(subject.ids(group.context)), "full": found[FULL].spread(), "full_peak": found[FULL].peak,
                "rows": rows, "captures_while_timed": _captures(subject) - graphs,
            }  # fmt: skip
            if ENGINE in found:
                record["engine_full"] = found[ENGINE].spread()
            self._results.put(group.name, record)
        for row in rows:
            self._tell(line(row))

    def _ways(self, group: Group) -> tuple[dict[Any, Way], dict[Any, ReuseConfig]]:
        subject, context = self._subject, group.context
        ids = subject.ids(context, group.codec)
        given, attention = torch.tensor(ids), subject.attention[1]
        ways: dict[Any, Way] = {FULL: lambda: (subject.full(given, attention), None)}
        if context not in self._checked and self._full_rounds is None:
            # Once for each context, because tiers and codecs make no difference to it.
            ways[ENGINE] = lambda: (subject.engine_full(context, group.codec), None)
            self._checked.add(context)
        configs: dict[Any, ReuseConfig] = {}
        for setting in group.settings:
            config = self._config(group, setting)
            name = f"{setting.selector} {'tuned' if setting.ratio is None else setting.ratio}"
            configs[name] = config
            ways[name] = partial(_reuse, subject, group, config)
        if group.phase == "peers":
            ways.update(_prefix_caching(subject, context, ids))
        if group.phase == "kvboost":
            ways[_KVBOOST] = _kvboost(subject, context)
        return ways, configs

    def _config(self, group: Group, setting: Setting) -> ReuseConfig:
        if setting.ratio is not None:
            return ReuseConfig(setting.selector, setting.ratio)
        ratio, skipped = self._subject.tuned(group.context, group.codec, setting.selector)
        return ReuseConfig(setting.selector, ratio, skipped)

    def _row(self, group: Group, name: str, found: dict[Any, Samples], config: ReuseConfig | None) -> dict[str, Any]:
        samples, full = found[name], found[FULL].median()
        row: dict[str, Any] = {
            "name": name, "phase": group.phase, "context": group.context, "tier": group.tier, "codec": group.codec,
            "ttft": samples.spread(), "full": full, "speedup": full / samples.median(),
        }  # fmt: skip
        if isinstance(samples.last, Report) and config is not None:
            row |= self._reuse_columns(group, samples, config, full)
        elif isinstance(samples.last, dict):
            row |= samples.last
        elif samples.last is not None:
            row |= vars(samples.last)
        row["peak_device_bytes"] = samples.peak
        return row

    def _reuse_columns(self, group: Group, samples: Samples, config: ReuseConfig, full: float) -> dict[str, Any]:
        subject, machine, report = self._subject, self._results.content["machine"], samples.last
        moved = sum(size for tier, size in report.bytes_read.items() if tier != "device")
        floors = {"compute": full * report.computed / report.prompt_tokens}
        if machine.get("copy_bytes_per_second"):
            floors["copy"] = moved / machine["copy_bytes_per_second"]
        if report.bytes_read.get("disk") and machine.get("disk_bytes_per_second"):
            floors["disk"] = report.bytes_read["disk"] / machine["disk_bytes_per_second"]
        bound = max(floors, key=lambda name: floors[name])
        kv = report.prompt_tokens * subject.kv_token_bytes
        # Memory that another package keeps on the device is not part of the request.
        own = samples.peak - subject.device_tier_bytes if samples.peak and group.phase != "peers" else 0
        return {
            "selector": config.selector, "ratio": config.ratio, "skipped": config.skipped,
            "prompt_tokens": report.prompt_tokens, "computed": report.computed, "probed": report.probed,
            "bytes_read": report.bytes_read, "timings": samples.split(), "floors": floors, "bound": bound,
            "floor": floors[bound], "share_of_floor": floors[bound] / samples.median(),
            "model_bytes": subject.model_bytes, "kv_bytes": kv,
            "memory_over": own / (subject.model_bytes + kv) - 1 if own else None,
        }  # fmt: skip

    def _timeline(self, group: Group) -> None:
        from .timeline import profile, summary

        lines = []
        for setting in group.settings:
            config = self._config(group, setting)
            run = partial(_reuse, self._subject, group, config)
            for _ in range(3):
                run()
            found = profile(run, self._trace_of(setting))
            lines.append({"selector": setting.selector, "ratio": setting.ratio, **found})
            self._tell(f"{setting.selector} {setting.ratio:g}: {summary(found)}")
        record = {"phase": group.phase, "context": group.context, "tier": group.tier, "codec": group.codec}
        self._results.put(group.name, {**record, "rounds": self._count, "rows": [], "timelines": lines})

    def _trace_of(self, setting: Setting) -> Path | None:
        if self._trace is None:
            return None
        name, *rest = self._trace.name.split(".")
        return self._trace.with_name(
            ".".join([f"{name}-{setting.selector}-r{100 * (setting.ratio or 0):02.0f}", *rest])
        )


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    text = (
        f"{row['phase']} {row['context']} {row['tier']} {row['codec']} {row['name']}: {row['ttft']['median'] * 1e3:.1f} ms, "
        f"{row['speedup']:.2f}x of {row['full'] * 1e3:.1f} ms"
    )
    if "floor" in row:
        split = ", ".join(f"{name} {took * 1e3:.1f}" for name, took in row["timings"].items())
        text += f"; floor {row['floor'] * 1e3:.1f} ms ({row['bound']}), {row['share_of_floor']:.0%}; {split}"
    if row.get("memory_over") is not None:
        text += f"; memory {row['memory_over']:+.1%}"
    return text


def _reuse(subject: Subject, group: Group, config: ReuseConfig) -> tuple[float, Report]:
    report = subject.reuse(group.tier, group.context, group.codec, config)
    return report.ttft, report


def _prefix_caching(subject: Subject, context: int, ids: list[int]) -> Iterator[tuple[str, Way]]:
    from peers import PrefixCaching

    # The query is at the end, with one token for each letter.
    caching = PrefixCaching(subject.model, ids, len(QUERY))
    for name, step in _PREFIX.items():
        yield name, partial(caching.request, subject.ids(context, step=step))


def _kvboost(subject: Subject, context: int) -> Way:
    from peers import KVBoost

    chunks = subject.chunks(context, "exact")
    engine = KVBoost(subject.model, chunks, subject.chunk_tokens, ratio=0.15)
    return lambda: engine.request(chunks, QUERY)


def _captures(subject: Subject) -> int:
    synchronize(subject.device)
    forward = subject.engine.adapter.device_forward
    return 0 if forward is None else forward.captures
