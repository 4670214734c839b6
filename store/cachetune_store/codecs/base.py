"""What a codec is, and the registry of them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..errors import UnknownCodecError
from ..layout import LayerSpec

__all__ = ["Codec", "codec_names", "get_codec", "register_codec"]


class Codec(ABC):
    """Turns keys and values of one layer into rows of bytes and back.

    A row holds K and V of one token; rows are independent, so any prefix of a layer's rows decodes alone. Codecs know
    nothing of tiers and hold no state.
    """

    name: str
    """Name in files and in `ChunkStore(codec=...)`. A change of what rows mean needs a new name."""
    error: str
    """The codec's error, in words."""

    @abstractmethod
    def row_bytes(self, spec: LayerSpec, dtype: str | torch.dtype) -> int:
        """Bytes of one row."""

    @abstractmethod
    def encode(self, k: Tensor, v: Tensor) -> Tensor:
        """Rows, uint8 [n, row_bytes], of `k` [n, heads, head_dim] and `v` [n, heads, v_head_dim], on their device."""

    @abstractmethod
    def decode(self, rows: Tensor, spec: LayerSpec, dtype: str | torch.dtype) -> tuple[Tensor, Tensor]:
        """K [n, heads, head_dim] and V [n, heads, v_head_dim] of `rows` (uint8 [n, row_bytes]), on their device."""

    def columns(self, spec: LayerSpec, dtype: str | torch.dtype) -> tuple[str, int]:
        """How a layer's tensor is declared in the file: safetensors dtype and number of columns.

        Bytes, unless a codec's rows are plain numbers of one dtype.
        """
        return "U8", self.row_bytes(spec, dtype)


_CODECS: dict[str, Codec] = {}


def register_codec(codec: Codec) -> None:
    """Make `codec` known under its name. A name can't change hands: files of that name would be misread."""
    known = _CODECS.get(codec.name)
    if known is not None and type(known) is not type(codec):
        raise ValueError(f"codec {codec.name!r} is already registered; give the new one another name")
    _CODECS[codec.name] = codec


def get_codec(name: str) -> Codec:
    """The codec registered as `name`.

    Raises:
        UnknownCodecError: there is none; the message lists those there are.
    """
    try:
        return _CODECS[name]
    except KeyError:
        raise UnknownCodecError(f"unknown codec {name!r}; registered: {', '.join(codec_names())}") from None


def codec_names() -> tuple[str, ...]:
    """Names of all registered codecs."""
    return tuple(sorted(_CODECS))
