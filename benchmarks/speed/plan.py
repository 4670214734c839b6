"""What is measured, and in which order: the most important first, in case that a run is cut off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SELECTORS = ("frequency", "expected_error")
PHASES = ("target", "device", "timeline", "int8", "disk", "reads", "peers", "codecs", "selectors", "kvboost")
"""In order of importance. target: the codec exact from the host tier. device: the same from the device tier. timeline: one request under the
profiler. int8: from the host tier. disk: at the tuned ratio, without the page cache. reads: from the same disk at the given ratios, so that commits
can be compared. peers: prefix caching, and reuse without recompute.
codecs: fp8 and int4 from the host tier, int8 and int4 from the device tier. selectors: expected_error_early and probe. kvboost: the package of
that name, of which a request takes seconds.
"""


@dataclass(frozen=True)
class Setting:
    """What is recomputed. For a ratio of None, the engine is tuned first."""

    selector: str
    ratio: float | None


@dataclass(frozen=True)
class Group:
    """What is timed in turn, round by round, together with full prefill of the same prompt.

    Attributes:
        phase: one of PHASES.
        context: chunk tokens of the prompt.
        tier, codec: where the chunks are, and how they are stored.
        settings: settings of the requests with reuse. Empty for other packages, which have none.
    """

    phase: str
    context: int
    tier: str = "host"
    codec: str = "exact"
    settings: tuple[Setting, ...] = ()

    @property
    def name(self) -> str:
        """A name that no other group of the run has."""
        tuned = [s.selector for s in self.settings if s.ratio is None]
        return " ".join([self.phase, str(self.context), self.tier, self.codec, *tuned])


def groups(
    phases: Sequence[str], contexts: Sequence[int], ratios: Sequence[float], selectors: Sequence[str] = SELECTORS
) -> list[Group]:
    """All groups of these phases, the most important first."""
    both = tuple(Setting(s, r) for s in selectors for r in ratios)
    return [group for phase in PHASES if phase in phases for group in _phase(phase, contexts, ratios, both)]


def _phase(phase: str, contexts: Sequence[int], ratios: Sequence[float], both: tuple[Setting, ...]) -> list[Group]:
    if phase == "target":
        return [Group(phase, c, settings=both) for c in contexts]
    if phase == "device":
        return [Group(phase, c, "device", settings=both) for c in contexts]
    if phase == "timeline":
        return [Group(phase, _nearest(contexts, 16384), settings=both)]
    if phase == "int8":
        return [Group(phase, c, codec="int8", settings=both) for c in contexts]
    if phase == "disk":
        long = [c for c in contexts if c >= 16384] or [max(contexts)]
        tuned = [("int4", "frequency"), ("int8", "frequency"), ("int4", "expected_error"), ("exact", "frequency")]
        return [Group(phase, c, "disk", codec, (Setting(s, None),)) for codec, s in tuned for c in long]
    if phase == "reads":
        long = [c for c in contexts if c >= 16384] or [max(contexts)]
        return [Group(phase, c, "disk", "int4", both) for c in long]
    if phase == "peers":
        return [Group(phase, c, settings=(Setting("none", 0.0),)) for c in contexts]
    if phase == "codecs":
        places = [("host", "int4"), ("host", "fp8"), ("device", "int8"), ("device", "int4")]
        return [Group(phase, c, tier, codec, both) for tier, codec in places for c in contexts]
    if phase == "selectors":
        return [
            Group(phase, c, settings=tuple(Setting(s, r) for s in ("expected_error_early", "probe") for r in ratios))
            for c in contexts
        ]
    return [Group(phase, c) for c in sorted(contexts) if c <= 16384]


def _nearest(contexts: Sequence[int], wanted: int) -> int:
    return min(contexts, key=lambda c: abs(c - wanted))
