"""What it takes, at the least, to reuse chunks that have to be read from a disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.reuse.plan import selector_of
from cachetune_rag.reuse.worth import savings_of
from cachetune_rag.selection import get_selector
from cachetune_rag.selection.base import budget
from cachetune_rag.text.prompts.prompt import Prompt, Span
from cachetune_store import ChunkLayout


@dataclass(frozen=True)
class Reading:
    """How long a prompt's rows take to be read, and what is computed meanwhile or behind it.

    Attributes:
        seconds: in which the rows that aren't in memory are likely to be read, at the least.
        before: the share of `seconds` that passes before anything is recomputed, from 0 to 1: a selector that looks at rows waits for those that it looks at.
        reused: tokens whose rows are likely to be used, where a ratio is to be found: at the most. All others are computed.
        ready: of the prompt's first tokens, so many are computed by a selector's look, while rows are read, and not again behind it.
    """

    seconds: float
    before: float
    reused: int
    ready: int = 0

    def least(self, meanwhile: float, behind: float) -> float:
        """The least seconds in which the prompt can be put together: no row is used before it is read, and layers are computed in order, as they are read.

        Args:
            meanwhile: seconds that the first `ready` tokens take to be computed.
            behind: seconds that all others take which aren't reused.
        """
        return max(self.seconds, max(self.before * self.seconds, meanwhile) + behind)


def reading_of(
    seconds: float, prompt: Prompt, config: ReuseConfig, spans: Sequence[Span], num_layers: int, *, in_turns: bool
) -> Reading:
    """What reading a prompt's rows means for computing it. The workers of a shared model say the same, since they have the same chunks.

    Args:
        seconds: see `Reading`.
        prompt: the prompt.
        config: its settings.
        spans: the places of its stored chunks, whether in memory or not.
        num_layers: layers of the model.
        in_turns: whether all rows are read before anything is computed (`Heads.in_turns`).
    """
    share = get_selector(config.selector).share(config.ratio)
    if config.finder is not None:
        share = min(config.finder.ratios, default=share)
    stored = {span.chunk for span in spans}
    missing = {span.chunk for span in prompt.spans} - stored
    savings = savings_of(prompt, max(share, config.skipped), missing=missing)
    selector = selector_of(config)
    looks = config.finder is not None or 0 < budget(share, savings.stored) < savings.stored
    layers = selector.looks_at(num_layers) if selector is not None and looks else 0
    if in_turns:
        return Reading(seconds, 1.0, savings.reused)
    # A probe of all layers leaves the rows of what stands before the first reused chunk.
    deep = selector is not None and layers and selector.layers(num_layers) == num_layers
    first = min((span.start for span in spans), default=0)
    return Reading(seconds, layers / num_layers, savings.reused, first if deep else 0)


def rows_of(config: ReuseConfig, layout: ChunkLayout) -> int:
    """How many rows of each layer of a chunk a request will read at tuned settings."""
    selector = get_selector(config.selector)
    unread = config.ratio if selector.offline and not selector.shift else config.skipped
    return layout.tokens - budget(unread, layout.tokens)
