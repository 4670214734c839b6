"""A Llama in NumPy and float64, written down from the formulas of docs/selection.md: what the fast path is checked against.

Everything is a loop or an array of the full shape; nothing is shared with the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any


@dataclass
class Run:
    """What a forward over some rows of a prompt gives: logits of the last row, keys (rotated) and values of each layer
    [T, H, D], and the expected error of every row [T]."""

    logits: Array
    keys: list[Array]
    values: list[Array]
    error: Array


class PlainLlama:
    """Weights of a transformers Llama (no biases, default rotary positions)."""

    def __init__(self, model: Any):
        config = model.config
        self.weights = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
        self.layers, self.heads, self.kv_heads = (
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.dim, self.eps = config.head_dim, config.rms_norm_eps
        theta = config.rope_parameters["rope_theta"]
        self.inverse = theta ** (-np.arange(0, self.dim, 2) / self.dim)

    def of(self, layer: int, name: str) -> Array:
        return self.weights[f"model.layers.{layer}.{name}.weight"]

    def norm(self, x: Array, weight: Array) -> Array:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.eps) * weight

    def rotate(self, x: Array, positions: Array) -> Array:
        """[rows, heads, D] turned to `positions`."""
        angles = positions[:, None, None] * self.inverse
        a, b = x[..., : self.dim // 2], x[..., self.dim // 2 :]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)

    def forward(
        self,
        ids: Sequence[int],
        rows: Sequence[int],
        stored: Sequence[tuple[Array, Array]] = (),
        spans: Sequence[tuple[int, int]] = (),
        strength: float = 0.0,
        kappa: float = 2.0,
        queries: int = 1,
        deviations: Array | None = None,
        shortlist: tuple[int, int, Sequence[int]] | None = None,
        left_out: Sequence[int] = (),
    ) -> Run:
        """Compute `rows` (ascending) over `stored`: per layer keys before rotation and values of every row, [T, H, D].

        `shortlist`: (layers, count, among). Behind so many layers, all of `among` but the `count` with the largest error so far are hidden.
        `left_out`: rows that are hidden in all layers.
        """
        hidden_rows = list(left_out)
        places, everywhere = np.array(rows), np.arange(len(ids))
        hidden = self.weights["model.embed_tokens.weight"][np.array(ids)[places]]
        run = Run(None, [], [], np.zeros(len(ids)))
        reused = [j for j in everywhere if j not in set(rows)]
        column = 0
        for layer in range(self.layers):
            if shortlist is not None and layer == shortlist[0]:
                ranked = sorted(shortlist[2], key=lambda j: (-run.error[j], j))
                hidden_rows = [*left_out, *ranked[shortlist[1] :]]
            x = self.norm(hidden, self.of(layer, "input_layernorm"))
            q, k, v = ((x @ self.of(layer, f"self_attn.{n}_proj").T).reshape(len(rows), -1, self.dim) for n in "qkv")
            if stored:
                keys, values = (np.array(s, dtype=np.float64) for s in stored[layer])
            else:
                keys, values = (np.zeros((len(ids), self.kv_heads, self.dim)) for _ in range(2))
            for start, end in spans:
                inside = [(i, j) for i, j in enumerate(rows) if start <= j < end]
                if not inside:
                    continue
                share = strength / (len(inside) + kappa)
                move_k = share * sum(k[i] - keys[j] for i, j in inside)
                move_v = share * sum(v[i] - values[j] for i, j in inside)
                for j in reused:
                    if start <= j < end:
                        keys[j] += move_k
                        values[j] += move_v
            keys[places], values[places] = k, v
            q, rotated = self.rotate(q, places), self.rotate(keys, everywhere)
            run.keys.append(rotated)
            run.values.append(values)
            group = self.heads // self.kv_heads
            out = self.of(layer, "self_attn.o_proj").reshape(-1, self.heads, self.dim)
            heads = np.zeros((len(rows), self.heads, self.dim))
            for g in range(self.heads):
                h = g // group
                scores = q[:, g] @ rotated[:, h].T / np.sqrt(self.dim)
                scores[places[:, None] < everywhere[None]] = -np.inf
                scores[:, hidden_rows] = -np.inf
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                heads[:, g] = weights @ values[:, h]
                if deviations is None:
                    continue
                off_k, off_v = deviations[:, column + h], deviations[:, column + self.kv_heads + h]
                gain = np.linalg.norm(out[:, g]) / np.sqrt(self.dim)
                for i in range(len(rows))[-queries:]:
                    share = weights[i] / np.linalg.norm(hidden[i])
                    distance = np.linalg.norm(values[:, h] - heads[i, g], axis=-1)
                    by_key = np.linalg.norm(q[i, g]) * distance * off_k * gain / self.dim
                    run.error += share * (off_v + by_key)
            column += 2 * self.kv_heads
            hidden = hidden + np.einsum("nhd,ehd->ne", heads, out)
            x = self.norm(hidden, self.of(layer, "post_attention_layernorm"))
            gate, up = (x @ self.of(layer, f"mlp.{n}_proj").T for n in ("gate", "up"))
            hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ self.of(layer, "mlp.down_proj").T
        run.logits = self.norm(hidden[-1], self.weights["model.norm.weight"]) @ self.weights["lm_head.weight"].T
        return run
