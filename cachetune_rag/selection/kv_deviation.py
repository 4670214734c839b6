"""CacheBlend's selection: recompute the tokens whose stored KV is furthest from what full prefill would compute."""

from __future__ import annotations

from torch import Tensor

from cachetune_rag.selection import names
from cachetune_rag.selection.base import SelectionContext, Selector, all_places, top_set, total_budget


class KVDeviationSelector(Selector):
    """The top r over all chunks by KV deviation at one early layer (CacheBlend, arXiv 2405.16444, section 4).

    As published, every token of the prompt is run through the first layers. A token's deviation is the absolute difference between its
    KV from full prefill and its stored KV (section 4.1). It is taken here as the length of the difference vector of keys and values
    over all heads. The tokens with the largest deviations of the whole context are recomputed (section 4.3).

    Unlike the paper, which chooses a slightly smaller set on every further layer, this uses the set of one layer for all layers, as
    the authors' code does (LMCache, which looks at the keys of layer 1 alone). The KV that the first layers computed for the other
    tokens is not kept.
    """

    name = names.KV_DEVIATION

    def __init__(self, layer: int = 1):
        """`layer`: where KV is compared. At layer 0 nothing differs, because KV depends on the token alone there."""
        self.layer = layer

    def looks_at(self, num_layers: int) -> int:
        """See `Selector.looks_at`."""
        return min(self.layer + 1, num_layers)

    def select(self, context: SelectionContext, ratio: float) -> Tensor:
        """See `Selector.select`."""
        places = all_places(context.chunks)
        count = total_budget(context.chunks, ratio)
        if count in (0, len(places)):
            return places[:count]
        layer = min(self.layer, context.num_layers - 1)
        pairs = zip(context.fresh_states(layer), context.reused_states(layer), strict=True)
        keys, values = (_squared(fresh, reused, places) for fresh, reused in pairs)
        return places[top_set((keys + values).cpu(), count)]


def _squared(fresh: Tensor, reused: Tensor, places: Tensor) -> Tensor:
    """Squared length of each token's difference vector: float32 [tokens]."""
    places = places.to(fresh.device)
    return (fresh[places].float() - reused[places].float()).square_().sum((1, 2))
