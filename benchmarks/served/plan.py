"""What is measured on which server, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Variant = Literal["vllm", "reuse", "ceiling"]
"""Plain vLLM, vLLM with this package's connector, vLLM with a connector that does a prefill for nothing."""

PHASES = (
    "alone", "paused", "saturated", "choosing", "shares", "gaps", "short", "within", "plain", "arrivals", "prefix", "host",
    "timeline", "disk", "ceiling",
)  # fmt: skip
PAUSES = {"50 ms": 0.05, "no pause": 0.0, "5 ms": 0.005, "500 ms": 0.5}
"""How long a server rests before each request of the phase `paused`, in seconds, by the detail of its cells. "no pause" is `alone` once more, behind the first
pause: so what differs by pauses is told from what differs from one time to another."""
WAYS: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "switches every 0.5 ms": {"switch": 0.0005},
    "no collector": {"collect": False},
    "memory not looked at": {},
}
"""In which ways the phase `choosing` watches the thread that puts prompts together, by the detail of its cells: as the server runs; with another switch interval of the interpreter; without Python's
garbage collector; and while the benchmark doesn't ask the device for its memory (`UNLOOKED`)."""
UNLOOKED = "memory not looked at"
PAUSED = ("", "frequency 0.05", "default 0.05")
"""The settings of the phase `paused`; "" is plain vLLM."""


@dataclass(frozen=True)
class Setting:
    """A way to reuse.

    Attributes:
        asked: what requests ask for.
        codec: how the chunks that they show are stored.
    """

    asked: Mapping[str, Any]
    codec: str = "exact"


SETTINGS: dict[str, Setting] = {
    "frequency 0.05": Setting({"selector": "frequency", "ratio": 0.05}),
    "default 0.05": Setting({"ratio": 0.05}),
    "default 0.15": Setting({"ratio": 0.15}),
    "frequency 0.05 int8": Setting({"selector": "frequency", "ratio": 0.05}, "int8"),
    "default 0.05 int8": Setting({"ratio": 0.05}, "int8"),
    "default 0.15 int8": Setting({"ratio": 0.15}, "int8"),
}
"""The settings of requests that reuse, by the name in tables."""
FROM_DISK: dict[str, Setting] = {
    "frequency 0.15 int4": Setting({"selector": "frequency", "ratio": 0.15}, "int4"),
    "default 0.15 int4": Setting({"ratio": 0.15}, "int4"),
    "frequency 0.3 int4": Setting({"selector": "frequency", "ratio": 0.3}, "int4"),
    "default 0.3 int4": Setting({"ratio": 0.3}, "int4"),
    "frequency 0.15": Setting({"selector": "frequency", "ratio": 0.15}),
    "default 0.15": SETTINGS["default 0.15"],
}
"""The settings of the phase `disk`: the codec of the fewest bytes, and the exact one."""
SLOWED, SLOWED_SETTING = "slowed", "frequency 0.15 int4"
"""The detail of the cells of the phase `disk` whose disk is made slower on purpose, and their setting."""
SHORT = (256, 512, 1024, 2048, 4096)
SHORT_CHUNKS = "short"
"""The name of the workload whose chunks are so short that a prompt of 256 tokens has several."""
TINY = 64
"""Tokens of the prompt that shows what vLLM takes for any request."""


def setting_of(name: str) -> Setting | None:
    """A setting by its name; None where nothing is asked for ("auto", "")."""
    return (SETTINGS | FROM_DISK).get(name)


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        variant: the server.
        phase: one of `PHASES`.
        context: tokens of chunks in a prompt.
        setting: a name of `SETTINGS` or `FROM_DISK`, "auto" (a request without settings), or "" where nothing is reused.
        detail: what differs further: a share, an order, a rate, a pause, a slowed disk.
    """

    variant: Variant
    phase: str
    context: int
    setting: str = ""
    detail: str = ""

    @property
    def name(self) -> str:
        """Identifies it in the results."""
        return "/".join(map(str, (self.variant, self.phase, self.context, self.setting, self.detail))).rstrip("/")

    @classmethod
    def of(cls, name: str) -> Cell:
        """The cell that has a name."""
        variant, phase, context, *further = name.split("/")
        return cls(variant, phase, int(context), *further)  # type: ignore[arg-type]

    @property
    def prompts(self) -> str:
        """Two cells have the same prompts if they have this in common.

        Every cell has orders and questions of its own, so that no prompt is found complete in a cache. Cells that are compared differ in these alone: their
        prompts have the same lengths. `paused` has those of `alone`, and begins with nothing in vLLM's prefix cache.
        """
        phase, detail = ("alone", "") if self.phase == "paused" else (self.phase, self.detail)
        return f"{phase} {self.context} {detail}" + (f" {self.setting}" if self.variant == "reuse" else "")


def cells(phases: Sequence[str], contexts: Sequence[int], settings: Sequence[str]) -> Iterator[Cell]:
    """All cells, grouped by server, in each group the most important first."""
    for variant in ("vllm", "reuse"):
        for cell in _of_both(variant, contexts, settings if variant == "reuse" else [""]):
            if cell.phase in phases:
                yield cell
    if "ceiling" in phases:
        yield from (Cell("ceiling", "ceiling", context) for context in contexts)


def _of_both(variant: Variant, contexts: Sequence[int], settings: Sequence[str]) -> Iterator[Cell]:
    """The cells that plain vLLM and vLLM with the connector have in common, and those of one of them."""
    reuse = variant == "reuse"
    auto = "auto" if reuse else ""
    exact = [setting for setting in settings if not setting or SETTINGS[setting].codec == "exact"]
    for context in contexts:
        yield from (Cell(variant, "alone", context, setting) for setting in settings)
        # What plain vLLM does after other pauses is shown by its shortest prompts: the others take seconds each.
        pauses = PAUSES if reuse or context == min(contexts) else ["50 ms"]
        yield from (
            Cell(variant, "paused", context, setting, pause)
            for setting in settings
            if setting in PAUSED
            for pause in pauses
        )
        yield from (Cell(variant, "saturated", context, setting) for setting in settings)
    if reuse:  # of the shortest prompts, which the host bounds; in all ways where most is missed
        yield from (Cell(variant, "choosing", min(contexts), setting) for setting in exact)
        if "default 0.15" in exact:
            yield from (Cell(variant, "choosing", min(contexts), "default 0.15", way) for way in WAYS if way)
    for context in contexts:
        if reuse:  # without reuse, "saturated" is the same
            yield from (Cell(variant, "shares", context, setting, "stored 0.8") for setting in exact)
            yield Cell(variant, "shares", context, auto, "stored 0")
        yield from (Cell(variant, "shares", context, setting, "log-normal") for setting in exact)
    for context in contexts:
        yield from (Cell(variant, "gaps", context, setting) for setting in exact)
    # There are stored chunks for prompts of the longest context, and no more.
    yield from (Cell(variant, "short", context, auto) for context in SHORT if context <= max(contexts))
    for context in contexts:
        yield from (Cell(variant, "within", context, setting) for setting in exact)
    for context in contexts:
        yield Cell(variant, "plain", context)
        rates = ("0.9", "2", "4") if reuse else ("0.9",)
        yield from (Cell(variant, "arrivals", context, setting, rate) for setting in exact for rate in rates)
        if not reuse:
            yield from (Cell(variant, "prefix", context, detail=order) for order in ("same", "shuffled"))
    # Last: vLLM's functions go on noting when they begin and end.
    yield Cell(variant, "host", TINY)
    for context in contexts:
        yield from (Cell(variant, "host", context, setting) for setting in exact)
    if reuse:
        for context in contexts:
            yield from (Cell(variant, "timeline", context, setting) for setting in exact)
        # Behind these, chunks aren't in memory. A disk that was slow is known to be for a while, so it comes last.
        for context in contexts:
            yield from (Cell(variant, "disk", context, setting) for setting in FROM_DISK)
        yield from (Cell(variant, "disk", context, SLOWED_SETTING, SLOWED) for context in contexts)
