"""CacheBlend's selection: recompute the tokens whose stored KV is furthest from what full prefill would have."""

from __future__ import annotations

from torch import Tensor

from cachetune_rag.selection import names
from cachetune_rag.selection.base import SelectionContext, Selector, all_places, top_set, total_budget


class KVDeviationSelector(Selector):
    """The top r over all chunks by KV deviation at one early layer (CacheBlend, arXiv 2405.16444, section 4).

    As published: every token of the prompt is run through the first layers; the deviation of a token is the absolute
    difference (section 4.1) of its full-prefill and its stored KV, taken here as the length of the difference of keys and
    values together, over all heads; the tokens with the largest ones, of the whole context, are recomputed (section 4.3).

    Not as published: the paper filters gradually, with a slightly smaller set on every further layer; here the set of one
    layer is used for all, as in the authors' code (LMCache, which looks at the keys of layer 1 alone). The fresh KV that the
    first layers give for the other tokens is not kept.
    """

    name = names.KV_DEVIATION

    def __init__(self, layer: int = 1):
        """`layer`: where KV is compared; at layer 0 it depends on the token alone, so stored KV is right there."""
        self.layer = layer

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
    """Squared length of each token's difference, float32 [tokens]."""
    places = places.to(fresh.device)
    return (fresh[places].float() - reused[places].float()).square_().sum((1, 2))
