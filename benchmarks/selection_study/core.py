"""A small Llama forward in float32: keys before rotation, one set of recomputed tokens, the probe's scores, the chunk shift.

Shapes: L layers, H key-value heads, HQ query heads (G = HQ / H), D head size, E hidden size, T tokens of a prompt.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor


@dataclass
class Layer:
    """Weights of a layer, and what the score needs of its output projection."""

    norm1: Tensor
    norm2: Tensor
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    gram: Tensor  # [H, D, D]: Wo^T Wo of a query head, averaged over the G heads of each key-value head
    gain: Tensor  # [HQ]: |Wo of the head|_F / sqrt(D)


class Model:
    """A model folder in transformers' format (Llama architecture without biases or rope scaling)."""

    def __init__(self, folder: Path, device: str):
        config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors", device=device)
        self.device, self.eps = device, config["rms_norm_eps"]
        self.L, self.HQ, self.H = (config[f"num_{n}"] for n in ("hidden_layers", "attention_heads", "key_value_heads"))
        self.E, self.G = config["hidden_size"], self.HQ // self.H
        self.D = config.get("head_dim") or self.E // self.HQ
        theta = config["rope_theta"] if "rope_theta" in config else config["rope_parameters"]["rope_theta"]
        self.inverse = 1.0 / (theta ** (torch.arange(0, self.D, 2, device=device).float() / self.D))
        get = lambda name: weights[f"model.{name}.weight"].float()  # noqa: E731
        self.embedding, self.norm = get("embed_tokens"), get("norm")
        self.head = weights["lm_head.weight"].float() if "lm_head.weight" in weights else self.embedding
        self.layers = [self._layer(lambda name, i=i: get(f"layers.{i}.{name}")) for i in range(self.L)]

    def _layer(self, get: Any) -> Layer:
        out = get("self_attn.o_proj")
        heads = out.view(self.E, self.HQ, self.D)
        gram = torch.einsum("ehd,ehf->hdf", heads, heads)
        return Layer(
            norm1=get("input_layernorm"),
            norm2=get("post_attention_layernorm"),
            qkv=torch.cat([get(f"self_attn.{x}_proj") for x in "qkv"]).contiguous(),
            out=out,
            gate_up=torch.cat([get("mlp.gate_proj"), get("mlp.up_proj")]).contiguous(),
            down=get("mlp.down_proj"),
            gram=gram.view(self.H, self.G, self.D, self.D).mean(1),
            gain=(gram.diagonal(dim1=1, dim2=2).sum(1) / self.D).sqrt(),
        )

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [T, D] each."""
        angles = positions.float()[:, None] * self.inverse[None]
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()

    def rms(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """RMS norm."""
        return F.rms_norm(hidden, (self.E,), weight, self.eps)

    def project(self, layer: Layer, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [..., HQ, D], keys and values [..., H, D] of a layer's input."""
        x = self.rms(hidden, layer.norm1) @ layer.qkv.T
        q, k, v = x.split([self.HQ * self.D, self.H * self.D, self.H * self.D], -1)
        return q.unflatten(-1, (self.HQ, self.D)), k.unflatten(-1, (self.H, self.D)), v.unflatten(-1, (self.H, self.D))

    def mlp(self, layer: Layer, hidden: Tensor) -> Tensor:
        """The second half of a layer, with its residual."""
        gate, up = (self.rms(hidden, layer.norm2) @ layer.gate_up.T).chunk(2, -1)
        return hidden + (F.silu(gate) * up) @ layer.down.T


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [..., T, D]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


@torch.no_grad()
def dense(m: Model, ids: Tensor, keep: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Full prefill of ids [B, T]: K before rotation and V, [L, B, T - keep, H, D] without the first `keep` rows; hidden."""
    batch, tokens = ids.shape
    cos, sin = m.tables(torch.arange(tokens, device=m.device))
    hidden = m.embedding[ids]
    keys = torch.empty(m.L, batch, tokens - keep, m.H, m.D, device=m.device)
    values = torch.empty_like(keys)
    for i, layer in enumerate(m.layers):
        q, k, v = m.project(layer, hidden)
        keys[i], values[i] = k[:, keep:], v[:, keep:]
        q = rope(q.transpose(1, 2), cos, sin)
        k = rope(k.transpose(1, 2), cos, sin).repeat_interleave(m.G, 1)
        v = v.transpose(1, 2).repeat_interleave(m.G, 1)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, tokens, -1)
        hidden = m.mlp(layer, hidden + heads @ layer.out.T)
    return keys, values, m.rms(hidden, m.norm)


@dataclass
class Base:
    """Assembled KV of one prompt. `sk`, `sv`, `sv_raw` [L, H, T] are deviations over leads (None: unknown)."""

    keys: Tensor  # [L, T, H, D] before rotation
    values: Tensor  # [L, T, H, D]
    plain: Tensor  # keys as [L, H, T, D]
    rotated: Tensor  # [L, H, T, D]
    v: Tensor  # [L, H, T, D]
    sk: Tensor | None = None
    sv: Tensor | None = None
    sv_raw: Tensor | None = None


def base_of(prompt: Any, keys: Tensor, values: Tensor) -> Base:
    """Rotate to the prompt's positions."""
    plain = keys.transpose(1, 2)
    rotated = rope(plain, prompt.cos, prompt.sin).contiguous()
    return Base(keys, values, plain.contiguous(), rotated, values.transpose(1, 2).contiguous())


def predict(m: Model, prompt: Any, base: Base, i: int, deltas: Tensor, where: Any, how: dict[str, Any]) -> Tensor:
    """What the reused rows' K and V are off by, [2, H, reused, D], from the deltas [2, H, n, D] of the selected rows.

    `how["mode"]`: plain (mean of the chunk), sig (deltas in units of sk and sv_raw), ivw (weights 1 / s^2), kernel (weights
    falling with distance). `lam` is a factor, or "ada": fitted per layer and head, each selected token left out in turn.
    """
    picked, chunk, reused, reused_chunk = where
    mode, lam, kappa = how["mode"], how["lam"], how["kappa"]
    if mode == "kernel":
        weight = torch.exp(-(picked[:, None] - reused[None]).abs().float() / how["tau"]) * (
            chunk[:, None] == reused_chunk[None]
        )
        mean = torch.einsum("nr,khnd->khrd", weight, deltas) / (weight.sum(0) + kappa)[:, None]
        return lam * mean
    sigma = torch.stack((base.sk[i], base.sv_raw[i])).clamp_min(1e-6) if mode in ("sig", "ivw") else None
    scale = None
    if mode == "sig":
        weight = unit = sigma[:, :, picked]
        scale = sigma[:, :, reused]
    elif mode == "ivw":
        weight = sigma[:, :, picked].pow(-2)
        unit = torch.ones_like(weight)
    else:
        weight = unit = torch.ones(2, m.H, picked.numel(), device=m.device)
    chunks = len(prompt.chunks)
    total = torch.zeros(2, m.H, chunks, m.D, device=m.device).index_add_(2, chunk, weight[..., None] * deltas)
    mass = weight * unit
    count = torch.zeros(2, m.H, chunks, device=m.device).index_add_(2, chunk, mass) + kappa * mass.mean(
        -1, keepdim=True
    )
    if lam == "ada":
        others = unit[..., None] * (total[:, :, chunk] - weight[..., None] * deltas)
        others = others / (count[:, :, chunk] - mass).clamp_min(1e-12)[..., None]
        fitted = (deltas * others).sum((2, 3)) / others.pow(2).sum((2, 3)).clamp_min(1e-12)
        lam = fitted.clamp(0, 1)[..., None, None] * how.get("factor", 1.0)
    mean = (total / count[..., None])[:, :, reused_chunk]
    if scale is not None:
        mean = mean * scale[..., None]
    return mean * lam


@torch.no_grad()
def forward(
    m: Model, prompt: Any, base: Base, rows: Tensor, shift: dict[str, Any] | None = None, probe: bool = False
) -> dict[str, Tensor]:
    """Compute `rows` (sorted positions) over the reused KV; all other rows come from `base`, shifted if asked for.

    Returns the last hidden states of `rows`; with `probe` also, summed over `rows`, the attention [L, HQ, T] and the expected
    error `ev`, `ek` [L, T].
    """
    result: dict[str, Tensor] = {}
    if probe:
        result["attention"] = torch.zeros(m.L, m.HQ, prompt.T, device=m.device)
        result["ev"] = torch.zeros(m.L, prompt.T, device=m.device)
        result["ek"] = torch.zeros(m.L, prompt.T, device=m.device)
    hidden, n = m.embedding[prompt.ids[rows]], rows.numel()
    cos, sin = prompt.cos[rows], prompt.sin[rows]
    hidden_from = rows[:, None] < prompt.places[None]
    is_reused = prompt.chunk_of >= 0
    is_reused[rows] = False
    inside = (prompt.chunk_of[rows] >= 0).nonzero()[:, 0]
    reused = is_reused.nonzero()[:, 0]
    where = rows[inside], prompt.chunk_of[rows[inside]], reused, prompt.chunk_of[reused]
    for i, layer in enumerate(m.layers):
        q, k, v = (x.transpose(0, 1) for x in m.project(layer, hidden))
        q = rope(q, cos, sin)
        keys, values = base.rotated[i].clone(), base.v[i].clone()
        if shift is not None and inside.numel():
            deltas = torch.stack((k[:, inside] - base.plain[i][:, where[0]], v[:, inside] - values[:, where[0]]))
            moved = predict(m, prompt, base, i, deltas, where, shift)
            keys[:, reused] += rope(moved[0], prompt.cos[reused], prompt.sin[reused])
            values[:, reused] += moved[1]
        keys[:, rows], values[:, rows] = rope(k, cos, sin), v
        scores = torch.bmm((q / math.sqrt(m.D)).reshape(m.H, m.G * n, m.D), keys.transpose(1, 2)).view(
            m.HQ, n, prompt.T
        )
        attention = scores.masked_fill_(hidden_from[None], -1e30).softmax(-1)
        heads = torch.bmm(attention.view(m.H, m.G * n, prompt.T), values).view(m.HQ, n, m.D)
        if probe:
            result["attention"][i] = attention.sum(1)
            if base.sk is not None:
                weight = attention / hidden.norm(dim=1).clamp_min(1e-6)[None, :, None]
                result["ev"][i] = (weight * base.sv[i].repeat_interleave(m.G, 0)[:, None]).sum((0, 1))
                distance = torch.cdist(heads, values.repeat_interleave(m.G, 0))
                gain = base.sk[i].repeat_interleave(m.G, 0) * layer.gain[:, None] / m.D
                result["ek"][i] = (weight * q.norm(dim=-1)[..., None] * distance * gain[:, None]).sum((0, 1))
        hidden = m.mlp(layer, hidden + heads.transpose(0, 1).reshape(n, -1) @ layer.out.T)
    result["hidden"] = m.rms(hidden, m.norm)
    return result
