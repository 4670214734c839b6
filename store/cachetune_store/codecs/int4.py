"""Four-bit integers: a bit more than a quarter of the bytes of 16-bit KV."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import NonFiniteError
from ..layout import HeadBytes, LayerSpec, RowFormat, torch_dtype
from .base import Codec

__all__ = ["Int4Codec"]

_GROUP = 64
_MIDDLE = 7.5
_BFLOAT16_MAX = torch.finfo(torch.bfloat16).max


class Int4Codec(Codec):
    """Keys have a scale for each channel and 64 rows, values for each token and head, as in KIVI (arXiv 2402.02750).

    Before rotation, each channel of the keys stays in a narrow range of its own from token to token. Values have no such channels.
    A number is (step - 7.5) * scale + middle, in float32. Scale and middle are bfloat16.

    A group of 64 rows begins with the scales of all channels of K, and then their middles. A row is: the scales of V's heads, V's
    middles, K's steps, V's steps, and zeros up to a multiple of 4 bytes. Of n steps, byte i holds number i in its lower half and
    number i + ceil(n / 2) in its upper half.
    """

    name = "int4"
    error = (
        "at most 1/29 of the spread (largest less smallest) of the values of the same head and token, or of the keys of the "
        "same channel in 64 tokens, plus 1/3800 of the largest of them, before rounding to the model's dtype"
    )

    def row_format(self, spec: LayerSpec, dtype: str | torch.dtype) -> RowFormat:
        """Groups of 64 rows, whatever the model's dtype."""
        channels = spec.heads * spec.head_dim
        row = 4 * spec.heads + _packed(channels) + _packed(spec.heads * spec.v_head_dim)
        return RowFormat(-(-row // 4) * 4, _GROUP, 4 * channels)

    def head_bytes(self, spec: LayerSpec, dtype: str | torch.dtype, heads: slice) -> HeadBytes:
        """Their scales and middles, and the bytes with their steps. The lower half of the heads shares its bytes with the upper half, so one
        half needs the steps of all."""
        first, count, channels = heads.start, heads.stop - heads.start, spec.heads * spec.head_dim
        start = 4 * spec.heads
        row = [(2 * first, 2 * count), (2 * (spec.heads + first), 2 * count)]
        row += _bytes_of(start, first * spec.head_dim, heads.stop * spec.head_dim, channels)
        start += _packed(channels)
        row += _bytes_of(start, first * spec.v_head_dim, heads.stop * spec.v_head_dim, spec.heads * spec.v_head_dim)
        of_keys = 2 * first * spec.head_dim, 2 * count * spec.head_dim
        return HeadBytes.of(row, [of_keys, (2 * channels + of_keys[0], of_keys[1])])

    def encode(self, k: Tensor, v: Tensor) -> Tensor:
        """Quantised rows.

        Raises:
            NonFiniteError: K or V holds an infinity or NaN, which no scale can carry.
        """
        tokens = k.shape[0]
        # Repeating the last row to fill the last group changes neither its smallest nor its largest number.
        count, fill = -(-tokens // _GROUP), -tokens % _GROUP
        keys = torch.cat((k, k[-1:].expand(fill, -1, -1)))
        values = torch.cat((v, v[-1:].expand(fill, -1, -1)))
        k_scale, k_middle, k_steps = _quantise(keys.view(count, _GROUP, k.shape[1] * k.shape[2]), 1, "keys")
        v_scale, v_middle, v_steps = _quantise(values, 2, "values")
        parts = [
            v_scale.flatten(1).view(torch.uint8),
            v_middle.flatten(1).view(torch.uint8),
            _pack(k_steps.flatten(0, 1)),
            _pack(v_steps.flatten(1)),
        ]
        short = -sum(part.shape[1] for part in parts) % 4
        rows = torch.cat([*parts, parts[0].new_zeros(values.shape[0], short)], dim=1)
        shared = torch.cat((k_scale, k_middle), dim=1).flatten(1).view(torch.uint8)
        encoded = torch.cat((shared, rows.view(count, _GROUP * rows.shape[1])), dim=1).flatten()
        return encoded[: encoded.numel() - fill * rows.shape[1]]

    def decode(
        self, encoded: Tensor, spec: LayerSpec, dtype: str | torch.dtype, pieces: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The numbers, by a multiplication and an addition for each, in float32."""
        form = self.row_format(spec, dtype)
        if pieces is None:
            pieces = [form.rows(encoded.numel())]
        heads, channels, v_channels = spec.heads, spec.heads * spec.head_dim, spec.heads * spec.v_head_dim
        groups = pad(encoded, (0, -encoded.numel() % form.span(1))).view(-1, form.span(1))
        shared = groups[:, : form.group_bytes].clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()
        rows = groups[:, form.group_bytes :].unflatten(1, (_GROUP, form.row_bytes))
        of_heads = rows[..., : 4 * heads].clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()
        start, middle = 4 * heads, 4 * heads + _packed(channels)
        k = _unpack(rows[..., start:middle], channels)
        k.mul_(shared[:, None, :channels]).add_(shared[:, None, channels:])
        v = _unpack(rows[..., middle : middle + _packed(v_channels)], v_channels).unflatten(2, (heads, spec.v_head_dim))
        v.mul_(of_heads[..., :heads, None]).add_(of_heads[..., heads:, None])
        wanted = torch_dtype(dtype)
        return (
            _without_fill(k.to(wanted).flatten(0, 1), pieces).unflatten(1, (heads, spec.head_dim)),
            _without_fill(v.to(wanted).flatten(0, 1), pieces),
        )


def _packed(count: int) -> int:
    """Bytes of `count` steps."""
    return -(-count // 2)


def _bytes_of(start: int, first: int, end: int, count: int) -> list[tuple[int, int]]:
    """Offsets and lengths of the bytes that hold the steps from `first` up to `end`, of `count` steps whose bytes begin at `start`."""
    half = _packed(count)
    lower, upper = (first, min(end, half)), (max(first, half) - half, end - half)
    return [(start + low, high - low) for low, high in (lower, upper) if low < high]


def _pack(steps: Tensor) -> Tensor:
    """Pack two steps into each byte: uint8 [n, count] becomes uint8 [n, ceil(count / 2)]."""
    low, high = steps.split((_packed(steps.shape[1]), steps.shape[1] // 2), dim=1)
    return low | pad(high, (0, steps.shape[1] % 2)) << 4


def _unpack(packed: Tensor, count: int) -> Tensor:
    """The steps minus 7.5, float32 [..., count]."""
    steps = torch.empty(*packed.shape[:-1], count, dtype=torch.float32, device=packed.device)
    half = packed.shape[-1]
    steps[..., :half] = packed & 15
    steps[..., half:] = packed[..., : count - half] >> 4
    return steps.sub_(_MIDDLE)


def _without_fill(rows: Tensor, pieces: Sequence[int]) -> Tensor:
    """The rows of all pieces. Each piece begins a new group, which may not be full."""
    if not any(count % _GROUP for count in pieces[:-1]):
        return rows[: sum(pieces)]
    wanted, start = [], 0
    for count in pieces:
        wanted.append(rows[start : start + count])
        start += -(-count // _GROUP) * _GROUP
    return torch.cat(wanted)


def _quantise(values: Tensor, dim: int, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and middles, bfloat16, for each range of `values` along `dim` (which has size 1 in them), and all steps, uint8."""
    exact = values.float()
    low, high = torch.aminmax(exact, dim=dim, keepdim=True)
    largest = float(torch.maximum(high, -low).max()) if high.numel() else 0.0
    if not largest < float("inf"):
        raise NonFiniteError(f"{what} hold an infinity or NaN, which codec 'int4' can't store; use codec 'exact'")
    middle = (low * 0.5 + high * 0.5).clamp_(-_BFLOAT16_MAX, _BFLOAT16_MAX).bfloat16()
    exact_middle = middle.float()
    # Measured from the rounded middle that is stored, so that its rounding only makes the steps slightly longer.
    scale = (torch.maximum(high - exact_middle, exact_middle - low) / _MIDDLE).bfloat16()
    exact_scale = scale.float()
    divisor = torch.where(exact_scale > 0, exact_scale, torch.ones_like(exact_scale))
    steps = ((exact - exact_middle) / divisor).add_(_MIDDLE).round_().clamp_(0, 15)
    if largest > 0.9 * torch.finfo(values.dtype).max:
        # A step that rounds away from zero must not leave the dtype's range.
        decoded = (steps - _MIDDLE) * exact_scale + exact_middle
        steps -= torch.where(torch.isinf(decoded.to(values.dtype)), torch.sign(decoded), 0.0)
    return scale, middle, steps.to(torch.uint8)
