"""One prompt of the study: its full prefill, captures of its chunks behind any lead-in, scores and measures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from core import Base, Model, dense
from torch import Tensor


class Prompt:
    """prefix + chunks + query + target of a record, with the full prefill of all of it."""

    def __init__(self, m: Model, record: dict[str, Any], prefix: Sequence[int]):
        self.m, ids = m, list(prefix)
        self.chunks: list[tuple[int, int]] = []
        for chunk in record["chunks"]:
            self.chunks.append((len(ids), len(ids) + len(chunk)))
            ids += chunk
        self.start, self.end = len(prefix), len(ids)
        self.N, self.queries, self.targets = self.end - self.start, len(record["query"]), len(record["ans"])
        ids = ids + record["query"] + record["ans"]
        self.T = len(ids)
        self.ids = torch.tensor(ids, device=m.device)
        self.places = torch.arange(self.T, device=m.device)
        self.cos, self.sin = m.tables(self.places)
        self.chunk_of = torch.full((self.T,), -1, device=m.device)
        for i, (a, b) in enumerate(self.chunks):
            self.chunk_of[a:b] = i
        self.tail = self.places[self.end :]
        self.query = self.tail[: self.queries]
        self.target = self.ids[self.T - self.targets :]
        keys, values, hidden = dense(m, self.ids[None])
        self.keys, self.values = keys[:, 0], values[:, 0]
        self.reference = (hidden[0, -self.targets - 1 : -1] @ m.head.T).log_softmax(-1)
        self.nll = -self.reference.gather(1, self.target[:, None]).mean().item()

    def capture(self, lead: Sequence[int]) -> tuple[Tensor, Tensor]:
        """K before rotation and V, [L, T, H, D]: chunks computed alone behind `lead`, all other rows exact."""
        longest = max(b - a for a, b in self.chunks)
        ids = torch.zeros(len(self.chunks), longest, dtype=torch.long, device=self.m.device)
        for i, (a, b) in enumerate(self.chunks):
            ids[i, : b - a] = self.ids[a:b]
        leads = torch.tensor([list(lead)] * len(self.chunks), device=self.m.device)
        keys, values, _ = dense(self.m, torch.cat((leads, ids), 1), keep=len(lead))
        all_keys, all_values = self.keys.clone(), self.values.clone()
        for i, (a, b) in enumerate(self.chunks):
            all_keys[:, a:b], all_values[:, a:b] = keys[:, i, : b - a], values[:, i, : b - a]
        return all_keys, all_values

    def capture_left(self, record: dict[str, Any], bos: int, length: int) -> tuple[Tensor, Tensor]:
        """The same with BOS and up to `length` tokens left of the chunk in its own document as lead-in."""
        original = record.get("original", record["chunks"])
        order = record.get("order", range(len(original)))
        flat, size = [x for chunk in original for x in chunk], len(original[0])
        all_keys, all_values = self.keys.clone(), self.values.clone()
        for (a, b), j in zip(self.chunks, order, strict=True):
            lead = [bos, *flat[max(0, j * size - length) : j * size]]
            ids = torch.tensor([lead + original[j]], device=self.m.device)
            keys, values, _ = dense(self.m, ids, keep=len(lead))
            all_keys[:, a:b], all_values[:, a:b] = keys[:, 0], values[:, 0]
        return all_keys, all_values

    def measure(self, hidden: Tensor) -> list[float]:
        """Over the target: KL(full prefill || reuse), top-1 agreement, that of its first token, NLL difference."""
        logs = (hidden[-self.targets - 1 : -1] @ self.m.head.T).log_softmax(-1)
        kl = (self.reference.exp() * (self.reference - logs)).sum(-1)
        same = (logs.argmax(-1) == self.reference.argmax(-1)).float()
        nll = -logs.gather(1, self.target[:, None]).mean().item()
        return [round(kl.mean().item(), 6), round(same.mean().item(), 4), int(same[0]), round(nll - self.nll, 5)]

    def top(self, scores: Tensor, count: int) -> Tensor:
        """The chunk tokens with the largest scores [T]."""
        return scores[self.start : self.end].topk(min(max(count, 0), self.N)).indices + self.start

    def top_per_chunk(self, scores: Tensor, ratio: float) -> Tensor:
        """The top share of each chunk."""
        return torch.cat([scores[a:b].topk(math.floor(ratio * (b - a))).indices + a for a, b in self.chunks])


def deviations(m: Model, base: Base, captures: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Fill sk, sv and sv_raw of `base`: root mean squares over the captures' distance from it."""
    sk = sv = raw = 0
    for keys, values in captures:
        sk = sk + (keys - base.keys).pow(2).sum(-1).transpose(1, 2)
        off = (values - base.values).transpose(1, 2)
        error = [torch.einsum("htd,hdf,htf->ht", d, w.gram, d) for d, w in zip(off, m.layers, strict=True)]
        sv = sv + torch.stack(error).clamp_min(0)
        raw = raw + off.pow(2).sum(-1)
    base.sk, base.sv, base.sv_raw = ((x / len(captures)).sqrt() for x in (sk, sv, raw))


def frequency(prompt: Prompt, base: Base) -> Tensor:
    """The paper's score [T]: norm after a low-pass along the chunk (alpha 0.5), K and V, mean over layers."""
    scores = torch.zeros(prompt.T, device=prompt.m.device)
    for a, b in prompt.chunks:
        share = 0.5 * (_low_pass_norm(base.keys[:, a:b]) + _low_pass_norm(base.values[:, a:b]))
        scores[a:b] = (share / share.sum(1, keepdim=True)).mean(0)
    return scores


def _low_pass_norm(x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(x, dim=1)
    spectrum[:, math.floor(0.5 * spectrum.shape[1]) :] = 0
    return torch.fft.irfft(spectrum, n=x.shape[1], dim=1).flatten(2).norm(dim=2)
