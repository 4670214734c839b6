"""Rotary positions, by the model's own tables and its own rotation function.

Keys are stored before the rotation and rotated when the place of their chunk in the prompt is known (deferred RoPE,
CacheTune section 4). Using the model's own code makes the result bit-identical to keys it computes in place, whatever
the scaling (llama3, yarn, linear, longrope, partial).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cachetune_rag.errors import UnsupportedModelError

Tables = tuple[Tensor, Tensor]

_FIXED = {"default", "linear", "llama3", "yarn"}
"""Kinds of scaling whose frequencies don't depend on the length of the prompt."""


@dataclass(frozen=True)
class Turn:
    """A layer's rotation taken apart: rotate(x)[token, head, i] = cos[token, i] * x[i] + sin[token, i] * quarter(x)[i].

    Every rotary embedding turns channels in pairs, so this holds for all of them; families differ in which channels make a
    pair, how their tables are laid out and how many channels they turn at all.

    Attributes:
        cos, sin: [length, head_dim], with 1 and 0 for channels that aren't turned.
        quarter: states [tokens, heads, head_dim] turned by a quarter in every pair.
    """

    cos: Tensor
    sin: Tensor
    quarter: Callable[[Tensor], Tensor]


class Rotary:
    """The rotation of one model: one table per layer type, one function per attention class."""

    def __init__(
        self,
        decoder: nn.Module,
        attentions: list[nn.Module],
        layer_types: list[str | None],
        architecture: str,
    ):
        module = getattr(decoder, "rotary_emb", None)
        if not isinstance(module, nn.Module):
            raise UnsupportedModelError(
                f"{architecture} has no rotary position embedding: its keys depend on the absolute position they were "
                "computed at (learned or ALiBi positions), so a chunk's keys can't be moved to another place. "
                "Use a model with rotary positions (Llama, Mistral, Qwen, Gemma, Phi-3, ...)."
            )
        self._module: Any = module
        self._typed = "layer_type" in inspect.signature(module.forward).parameters
        self._layer_types = layer_types
        kinds = getattr(module, "rope_type", None)
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        self._fixed = kinds <= _FIXED
        self._known: dict[str | None, Tables] | None = None
        self._known_length = 0
        self._used: dict[Any, Tensor | None] = {}
        self._functions = [_rotation_function(a, architecture) for a in attentions]
        # False for layers that apply no rotation at all (SmolLM3, Cohere 2); the check at load sets it.
        self.rotated = [True] * len(attentions)

    def tables(self, length: int, like: Tensor) -> dict[str | None, Tables]:
        """Cosine and sine for positions 0..length-1, per layer type.

        Computed for the whole prompt at once, because families with dynamic scaling choose their frequencies by the
        largest position of the call. Each table is [length, rotary_dim] in the dtype of `like`.
        """
        if not self._fixed:
            return self._make(length, like)
        # The tables are the same for every prompt: they are made once, for more positions than this prompt has.
        known = self._known
        if known is None or self._known_length < length or next(iter(known.values()))[0].device != like.device:
            self._known_length = -(-length // 4096) * 4096
            known = self._known = self._make(self._known_length, like)
        return {kind: (cos[:length], sin[:length]) for kind, (cos, sin) in known.items()}

    def _make(self, length: int, like: Tensor) -> dict[str | None, Tables]:
        positions = torch.arange(length, device=like.device)[None]
        probe = like.new_empty((1, 1, 1))
        kinds = sorted({t or "" for t in self._layer_types}) if self._typed else [""]
        made = {}
        for kind in kinds:
            args = (kind,) if self._typed else ()
            cos, sin = self._module(probe, positions, *args)
            made[kind] = (cos[0], sin[0])
        return {t: made[(t or "") if self._typed else ""] for t in set(self._layer_types)}

    def rotate(self, layer: int, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate `states` [tokens, heads, head_dim] by `cos`, `sin` [tokens, rotary_dim].

        Returns a tensor [tokens, heads, head_dim] (possibly a view with other strides).
        """
        if not self.rotated[layer]:
            return states
        width = self._width(cos, states.shape[-1])
        turned, rest = states[..., :width], states[..., width:]
        keys = turned.transpose(0, 1)[None]
        # The functions rotate a pair; zero heads of queries cost nothing.
        _, keys = self._functions[layer](keys[:, :0], keys, cos[None], sin[None])
        keys = keys[0].transpose(0, 1)
        return keys if rest.shape[-1] == 0 else torch.cat((keys, rest), dim=-1)

    def turn(self, layer: int, cos: Tensor, sin: Tensor, head_dim: int) -> Turn | None:
        """A layer's rotation taken apart, for tables `cos`, `sin` [length, rotary_dim]; None if it rotates nothing."""
        if not self.rotated[layer]:
            return None
        columns, width = cos.shape[1], self._width(cos, head_dim)
        used = self._columns_used(layer, columns, width, head_dim, cos.device)
        if used is not None:
            cos, sin = cos[:, used], sin[:, used]
        if width < head_dim:
            rest = (cos.shape[0], head_dim - width)
            cos, sin = torch.cat((cos, cos.new_ones(rest)), 1), torch.cat((sin, sin.new_zeros(rest)), 1)

        def quarter(states: Tensor) -> Tensor:
            table = states.new_ones(states.shape[0], columns)
            return self.rotate(layer, states, torch.zeros_like(table), table)

        return Turn(cos, sin, quarter)

    def turns(self, tables: dict[str | None, Tables], head_dims: Sequence[int]) -> list[Turn | None]:
        """`turn` of every layer, for the `tables` of a prompt; layers that rotate alike share one."""
        made: dict[Any, Turn | None] = {}
        keys = list(zip(self._layer_types, head_dims, self._functions, self.rotated, strict=True))
        for layer, key in enumerate(keys):
            if key not in made:
                made[key] = self.turn(layer, *tables[self._layer_types[layer]], head_dims[layer])
        return [made[key] for key in keys]

    def _columns_used(self, layer: int, columns: int, width: int, head_dim: int, device: torch.device) -> Tensor | None:
        """The column of the tables that each rotated channel uses; None if channel i uses column i everywhere."""
        key = layer, columns, head_dim, device
        if key not in self._used:  # kept, because the comparison below waits for the device
            # Rotating ones by a table whose column i holds i shows which column each channel uses.
            count = torch.arange(columns, dtype=torch.float32, device=device)[None]
            ones = count.new_ones(1, 1, head_dim)
            used = self.rotate(layer, ones, count, torch.zeros_like(count))[0, 0, :width].round().long()
            self._used[key] = None if torch.equal(used, torch.arange(columns, device=device)) else used
        return self._used[key]

    def comes_apart(self, layer: int, cos: Tensor, sin: Tensor, head_dim: int) -> bool:
        """Whether `turn` equals the layer's rotation, except for rounding. `cos` and `sin` are tables [tokens, rotary_dim]."""
        turn = self.turn(layer, cos, sin, head_dim)
        if turn is None:
            return True
        generator = torch.Generator().manual_seed(0)
        keys = torch.randn(cos.shape[0], 1, head_dim, dtype=torch.float32, generator=generator).to(cos)
        ours = turn.cos[:, None] * keys + turn.sin[:, None] * turn.quarter(keys)
        off = (ours - self.rotate(layer, keys, cos, sin)).float().norm() / keys.float().norm()
        return float(off) <= 8 * torch.finfo(cos.dtype).eps

    def half_split(self, layer: int, cos: Tensor, sin: Tensor, heads: int, head_dim: int) -> bool:
        """Whether the layer's rotation is, bit for bit, the common one: channel i turned with channel i + width / 2.

        Args:
            layer: which layer.
            cos, sin: tables of some positions [tokens, rotary_dim].
            heads, head_dim: shape of its keys.
        """
        if not self.rotated[layer]:
            return True
        if cos.shape[1] != self._width(cos, head_dim):
            return False
        generator = torch.Generator().manual_seed(0)
        keys = torch.randn(cos.shape[0], heads, head_dim, dtype=torch.float32, generator=generator).to(cos)
        return torch.equal(turn_half_split(keys, cos, sin), self.rotate(layer, keys, cos, sin))

    def _width(self, cos: Tensor, head_dim: int) -> int:
        """How many leading channels are rotated. gpt-oss keeps half tables, so the frequencies decide, not the table."""
        frequencies = [b for n, b in self._module.named_buffers(recurse=False) if n.endswith("inv_freq")]
        width = 2 * frequencies[0].numel() if frequencies else cos.shape[-1]
        return min(width, head_dim)


def turn_half_split(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The half-split rotation, in the dtype of `keys`: channel i turned together with channel i + width / 2.

    Args:
        keys: [n, heads, dim]; only the first `width` channels are rotated.
        cos, sin: [n, width].
    """
    width = cos.shape[1]
    turned, rest = keys[..., :width], keys[..., width:]
    low, high = turned.chunk(2, -1)
    swapped = torch.cat((-high, low), -1)
    return torch.cat((turned * cos[:, None] + swapped * sin[:, None], rest), -1)


def rows_of(tables: dict[str | None, Tables], positions: Tensor) -> dict[str | None, Tables]:
    """The rows of each table at `positions` [tokens]; worth keeping where many layers rotate the same tokens."""
    unique = {id(pair): pair for pair in tables.values()}
    rows = {key: (cos[positions], sin[positions]) for key, (cos, sin) in unique.items()}
    return {kind: rows[id(pair)] for kind, pair in tables.items()}


def longrope_boundary(config: Any) -> int:
    """Prompts longer than this use long-rope's long factors; 0 for other kinds of scaling."""
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):  # one set, or one a layer type
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            return int(part["original_max_position_embeddings"])
    return 0


def _rotation_function(attention: nn.Module, architecture: str) -> Callable[..., tuple[Tensor, Tensor]]:
    function = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if function is None:
        raise UnsupportedModelError(
            f"{architecture}: its modelling code ({type(attention).__module__}) has no `apply_rotary_pos_emb`, so stored "
            "keys can't be rotated exactly as the model does. Please open an issue that names the model."
        )
    return function
