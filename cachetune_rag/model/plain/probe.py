"""The probe: runs some tokens through the first layers and reads how they attend to the assembled KV of their prompt.

Plain torch, for any device. On a GPU the kernels add up the received attention themselves (`DeviceForward.received`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cachetune_rag.model.family import masks, output, taps
from cachetune_rag.model.family.rope import Tables, rows_of
from cachetune_rag.model.family.taps import StopForward
from cachetune_rag.model.plain.attention import watched
from cachetune_rag.model.plain.buffers import KVBuffers, ScatterCache
from cachetune_rag.model.plain.shortlist import Narrowing, Shortlist, masks_narrowed
from cachetune_rag.model.plain.watch import Shown, Watch, heads_of_rows, rows_of_heads
from cachetune_store.layout import LayerSpec

_TINY = 1e-6
"""Shorter layer inputs count as this long, so that nothing is divided by zero."""

_Look = Callable[[Shown, Tensor], None]
"""Gets what a layer shows, and 1 / |x| of the watched tokens' layer inputs x, [queries]."""


@dataclass(frozen=True, eq=False)
class ProbePass:
    """A forward of some of a prompt's tokens through the first layers, in which the last tokens' attention is watched.

    Attributes:
        ids, positions: the computed tokens and their positions, [tokens], ascending.
        buffers: KV of the prompt; in the layers that are run, rows at `positions` are overwritten.
        layers: how many layers are run, from the first.
        queries: how many of the last tokens are watched.
        before: `before(layer)` is called before a layer's buffer is used.
        shortlist: which rows the later layers look at; None: all layers look at the same rows. For `expected_error`.
        left_out: bool [length] on the host; rows that no layer looks at, as if the prompt didn't have these tokens: nothing need be in the
            buffers there. None: all rows are looked at.
    """

    ids: Tensor
    positions: Tensor
    buffers: KVBuffers
    layers: int
    queries: int
    before: Callable[[int], None]
    shortlist: Shortlist | None = None
    left_out: Tensor | None = None

    @property
    def looked_at(self) -> int:
        """How many rows are looked at in layers before those of the shortlist."""
        return self.buffers.length - (0 if self.left_out is None else int(self.left_out.sum()))

    @property
    def shortlisted(self) -> int:
        """How many rows the layers of the shortlist look at."""
        assert self.shortlist is not None
        return self.looked_at - int(self.shortlist.among.sum()) + self.shortlist.count

    def on(self, device: torch.device) -> ProbePass:
        """The same with `ids` and `positions` on a device."""
        return replace(self, ids=self.ids.to(device), positions=self.positions.to(device))


class Probe:
    """Forwards through the first layers in which the last tokens' attention is read.

    Args:
        attentions: the attention module of each layer.
        layers: the decoder layer that each stands in.
        found: where each layer's queries are read.
        specs: shapes of each layer's keys and values.
        windows: how many keys back each layer sees; None for all.
        tables: rotary tables of a prompt of so many tokens.
        rotate: turns a layer's queries [tokens, heads, head_dim] by rows of the tables, one a token.
        run: runs ids at positions, both [tokens], through the model with a cache over the buffers.
        shows: whether attention in `run` can be watched (`attention.watched`).

    All methods take a pass whose `ids` and `positions` are on the model's device.
    """

    def __init__(
        self,
        attentions: Sequence[nn.Module],
        layers: Sequence[nn.Module],
        found: Sequence[taps.Tap],
        specs: Sequence[LayerSpec],
        windows: Sequence[int | None],
        tables: Callable[[int], dict[str | None, Tables]],
        rotate: Callable[[int, Tensor, dict[str | None, Tables]], Tensor],
        run: Callable[[Tensor, Tensor, KVBuffers, ScatterCache], Tensor],
        shows: Callable[[], bool],
    ):
        self._attentions, self._layers, self._taps = list(attentions), list(layers), list(found)
        self._specs, self._windows = list(specs), list(windows)
        self._tables, self._rotate, self._run, self._shows = tables, rotate, run, shows
        self._gains: dict[int, Tensor | float] = {}

    def observe(self, probe: ProbePass, observe: Callable[[int, Tensor], None]) -> None:
        """Hand out the watched tokens' attention.

        `observe(layer, weights)` gets [heads, queries, length] in float32, each row a distribution over the prompt
        (soft-capping and learned sinks are left out, which keeps the order within a head). Rows that are left out have none of it.
        """

        def look(shown: Shown, near: Tensor) -> None:
            weights = heads_of_rows(shown.weights, near.shape[0])
            if (rows := narrowing.rows(shown.layer)) is not None:
                whole = weights.new_zeros(*weights.shape[:2], probe.buffers.length)
                weights = whole.index_copy_(2, rows, weights)
            observe(shown.layer, weights)

        narrowing = self._narrowing(probe)
        self._watch(probe, look, narrowing)

    def received(self, probe: ProbePass) -> Tensor:
        """The attention that each prompt token receives, float32 [length]: the sum over layers of the mean over heads and the
        watched tokens.
        """
        total = torch.zeros(probe.buffers.length, dtype=torch.float32, device=probe.positions.device)

        def look(shown: Shown, _near: Tensor) -> None:
            mean, rows = shown.weights.mean((0, 1)), narrowing.rows(shown.layer)
            total.add_(mean) if rows is None else total.index_add_(0, rows, mean)

        narrowing = self._narrowing(probe)
        self._watch(probe, look, narrowing)
        return total

    def expected_error(
        self, probe: ProbePass, deviations: Tensor, summed: Callable[[Tensor], Tensor] = lambda scores: scores
    ) -> Tensor:
        """How far off the watched tokens' layer outputs are expected to be because of each reused row, float32 [length].

        With j a row, g a query head that reads key-value head h, i a watched token, x_i its layer input, a its attention, o
        a head's output, Q the rotated query, s the attention's scale and D the width of a key, the sum over the layers
        that are run of

            Ev[j] = sum over g, i of a[g,i,j] / |x_i| * sV[h,j]
            Ek[j] = sum over g, i of a[g,i,j] / |x_i| * |Q[g,i]| * |V[h,j] - o[g,i]| * sK[h,j] * gain[g] * s / sqrt(D)

        The softmax turns an error e of key j into a[j] * (s Q.e) * (V_j - o) of the output, to first order, and sqrt(D)
        stands for an error of no particular direction. (docs/selection.md, "Online"; a family's norm or gate behind the
        output projection is left out, as are its learned sinks and soft-capping.)

        With a shortlist, the later layers run and are looked at as if the prompt had no other rows than those that they use, and a token that isn't
        in it keeps the score that the first layers gave it. Rows that are left out have a score of 0.

        Args:
            probe: which tokens are computed, and which are watched.
            deviations: [length, columns] of the layers that are run, as chunks store them (sK of every head of layer 0,
                sV of every head of layer 0, layer 1, ...); 0 where a row isn't reused.
            summed: adds up the scores of all heads, from those of the heads in this process (`Heads.total`), for a shortlist.
        """
        by_layer = self._deviations(deviations, probe.layers)
        total = torch.zeros(probe.buffers.length, dtype=torch.float32, device=probe.positions.device)

        def look(shown: Shown, near: Tensor) -> None:
            rows = narrowing.rows(shown.layer)
            if rows is None:
                total.add_(self._layer_error(shown, near, *by_layer[shown.layer]))
            else:
                off = (each.index_select(1, rows) for each in by_layer[shown.layer])
                total.index_add_(0, rows, self._layer_error(shown, near, *off))

        # A copy, because workers may add their parts up in the memory that they are given.
        narrowing = self._narrowing(probe, lambda: summed(total.clone()))
        self._watch(probe, look, narrowing)
        return total

    def _narrowing(self, probe: ProbePass, scores: Callable[[], Tensor] | None = None) -> Narrowing:
        """Hides what a pass doesn't look at. Only with `scores` is there a shortlist."""
        shortlist = None if scores is None else probe.shortlist
        return Narrowing(probe.left_out, shortlist, scores or (lambda: torch.empty(0)), probe.positions.device)

    def _watch(self, probe: ProbePass, look: _Look, narrowing: Narrowing) -> None:
        """Run the layers of the pass, and look at each when its buffer is complete."""
        queries = min(probe.queries, probe.positions.shape[0])
        near: dict[int, Tensor] = {}

        def on_input(layer: int, hidden: Tensor) -> None:
            near[layer] = hidden[0, -queries:].float().norm(dim=-1).clamp_min_(_TINY).reciprocal_()

        def show(shown: Shown) -> None:
            look(shown, near.pop(shown.layer))
            if shown.layer >= probe.layers - 1:
                raise StopForward

        run = self._run_shown if self._shows() else self._run_tapped
        with taps.inputs_tapped(self._layers, on_input), masks_narrowed(self._attentions, narrowing):
            try:
                run(probe, Watch(queries, show), narrowing)
            except StopForward:
                return

    def _run_shown(self, probe: ProbePass, watch: Watch, narrowing: Narrowing) -> None:
        """Reads the weights that this package's attention computes anyway."""
        with watched(watch):
            self._run_pass(probe, narrowing)

    def _run_tapped(self, probe: ProbePass, watch: Watch, narrowing: Narrowing) -> None:
        """The model runs its own attention, so the weights are computed a second time beside it."""
        place = probe.positions[-watch.tokens :]
        rows = rows_of(self._tables(probe.buffers.length), place)
        asked: dict[int, Tensor] = {}

        def on_query(layer: int, out: Tensor) -> None:
            asked[layer] = self._taps[layer].query(out)[0, -watch.tokens :]

        def after(layer: int, keys: Tensor, values: Tensor) -> None:
            at = narrowing.rows(layer)
            rotated = self._rotate(layer, asked.pop(layer), rows)
            query = rows_of_heads(rotated.transpose(0, 1), self._specs[layer].heads)
            allowed = masks.allowed(self._windows[layer], None, place, probe.buffers.length)
            weights = self._weights(layer, query, keys[0], allowed if at is None else allowed[:, at])
            watch.show(Shown(layer, query, weights, values[0], None))

        names = [t.query_module for t in self._taps]
        with taps.tapped(self._attentions, names, on_query):
            self._run_pass(probe, narrowing, after)

    def _run_pass(
        self,
        probe: ProbePass,
        narrowing: Narrowing,
        after: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> None:
        cache = ScatterCache(probe.buffers, probe.positions, probe.before, after, rows=narrowing.rows)
        self._run(probe.ids, probe.positions, probe.buffers, cache)

    def _weights(self, layer: int, query: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
        """Attention weights of a layer's `query` over `keys` [kv_heads, keys, dim]; `allowed` says which of them each token sees, bool [tokens, keys].
        `Shown` has the other shapes.
        """
        scores = (query @ keys.transpose(1, 2)).float().mul_(self._scale(layer, keys.shape[2]))
        scores.unflatten(1, (len(allowed), -1)).masked_fill_(~allowed[:, None], float("-inf"))
        return scores.softmax(-1)

    def _layer_error(self, shown: Shown, near: Tensor, key_deviation: Tensor, value_deviation: Tensor) -> Tensor:
        """Ev + Ek of one layer, float32 [keys]; the deviations are [kv_heads, keys]."""
        values = shown.values.float()
        kv_heads, dim = values.shape[0], shown.query.shape[2]
        group = shown.query.shape[1] // near.shape[0]
        outputs = shown.weights @ values if shown.outputs is None else shown.outputs
        # |V - o|^2 = |V|^2 + |o|^2 - 2 o V, which rounding may take below 0 where they are nearly the same.
        lengths = torch.linalg.vector_norm(values, dim=-1)[:, None].square_()
        off = torch.baddbmm(lengths, outputs, values.transpose(1, 2), alpha=-2)
        off.add_(outputs.square().sum(-1, keepdim=True)).clamp_min_(0).sqrt_().mul_(shown.weights)
        gain = self._gain(shown.layer, kv_heads * group)
        if isinstance(gain, Tensor):
            gain = gain.view(kv_heads, 1, group)
        ahead = near[:, None].expand(kv_heads, -1, group)
        steep = shown.query.float().norm(dim=-1).view(kv_heads, -1, group) * gain * ahead
        by_value = (ahead.reshape(kv_heads, 1, -1) @ shown.weights)[:, 0] * value_deviation
        scale = self._scale(shown.layer, dim) / math.sqrt(dim)
        by_key = (steep.view(kv_heads, 1, -1) @ off)[:, 0] * key_deviation * scale
        return (by_value + by_key).sum(0)

    def _deviations(self, deviations: Tensor, num_layers: int) -> list[tuple[Tensor, Tensor]]:
        """Stored columns [length, columns] -> of each layer, those of keys and of values, float32 [kv_heads, length]."""
        sizes = [spec.heads for spec in self._specs[:num_layers] for _ in range(2)]
        if deviations.shape[1] != sum(sizes):
            raise ValueError(f"deviations have {deviations.shape[1]} columns; {num_layers} layers make {sum(sizes)}.")
        parts = deviations.T.float().split(sizes)
        return list(zip(parts[::2], parts[1::2], strict=True))

    def _scale(self, layer: int, dim: int) -> float:
        module: Any = self._attentions[layer]
        return getattr(module, "scaling", None) or dim**-0.5

    def _gain(self, layer: int, heads: int) -> Tensor | float:
        """`output.gain` of the layer as [heads, 1]; 1 where its output projection isn't known."""
        if layer not in self._gains:
            weight = output.output_heads(self._attentions[layer], heads, self._specs[layer].v_head_dim)
            self._gains[layer] = 1.0 if weight is None else output.gain(weight)[:, None]
        return self._gains[layer]

    def gains(self) -> list[Tensor]:
        """`output.gain` of every layer, float32 [heads]; ones where its output projection isn't known."""
        made = []
        for layer in range(len(self._specs)):
            module: Any = self._attentions[layer]
            heads = module.config.num_attention_heads
            gain = self._gain(layer, heads)
            device = next(
                self._layers[layer].parameters()
            ).device  # the attention itself may have none (`ForeignLinear`)
            made.append(
                torch.ones(heads, dtype=torch.float32, device=device)
                if isinstance(gain, float)
                else gain[:, 0].contiguous()
            )
        return made
