"""What a codec is, and the registry of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import StoreArgumentError, UnknownCodecError
from ..layout import LayerSpec, RowFormat
from ..printing import shown

__all__ = ["Codec", "codec_names", "get_codec", "register_codec"]


class Codec(ABC):
    """Turns keys and values of one layer into rows of bytes and back.

    A row holds K and V of one token. Rows stand by themselves, or share something (scales) with the other rows of their
    group; either way any number of a layer's first rows decodes alone. Codecs know nothing of tiers and hold no state.
    """

    name: str
    """Name in files and in `ChunkStore(codec=...)`. A change of what rows mean needs a new name."""
    error: str
    """The codec's error, in words."""

    @abstractmethod
    def row_format(self, spec: LayerSpec, dtype: str | torch.dtype) -> RowFormat:
        """Bytes of a row, and of what a group of rows shares."""

    @abstractmethod
    def encode(self, k: Tensor, v: Tensor) -> Tensor:
        """Bytes of `k` [n, heads, head_dim] and `v` [n, heads, v_head_dim]: uint8 [row_format().size(n)], on their device.

        Rows come in the order in which they are to be stored, the first one at the beginning of a group.
        """

    @abstractmethod
    def decode(
        self, encoded: Tensor, spec: LayerSpec, dtype: str | torch.dtype, pieces: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """K [n, heads, head_dim] and V [n, heads, v_head_dim] of `encoded`, on its device.

        Args:
            encoded: uint8 [bytes], contiguous: the first n rows of a layer as encode() wrote them, or such pieces of
                several chunks, each row_format().span(its rows) behind the one before (what stands in between is not
                read).
            pieces: rows of each piece; None: all of `encoded` is one.
        """

    def declare(self, tokens: int, spec: LayerSpec, dtype: str | torch.dtype) -> tuple[str, list[int]]:
        """How a layer of `tokens` rows is declared in the file: safetensors dtype and shape.

        Bytes, a row each or (of grouped rows) in one piece, unless a codec's rows are plain numbers of one dtype.
        """
        rows = self.row_format(spec, dtype)
        return "U8", [rows.size(tokens)] if rows.group_bytes else [tokens, rows.row_bytes]


CODECS: dict[str, Codec] = {}
"""The registered codecs by name."""


def register_codec(codec: Codec) -> None:
    """Make `codec` known under its name. A name can't change hands: files of that name would be misread."""
    if not isinstance(codec, Codec) or not isinstance(codec.name, str):
        raise StoreArgumentError(
            f"codec is {shown(codec)}, a {type(codec).__name__}; use an instance of a class of Codec with a name"
        )
    known = CODECS.get(codec.name)
    if known is not None and type(known) is not type(codec):
        raise StoreArgumentError(f"codec {shown(codec.name)} is already registered; give the new one another name")
    CODECS[codec.name] = codec


def get_codec(name: str) -> Codec:
    """The codec registered as `name`.

    Raises:
        UnknownCodecError: there is none; the message lists those there are.
    """
    try:
        return CODECS[name]
    except (KeyError, TypeError):  # TypeError: nothing that could be a name
        raise UnknownCodecError(f"unknown codec {shown(name)}; registered: {', '.join(codec_names())}") from None


def codec_names() -> tuple[str, ...]:
    """Names of all registered codecs."""
    return tuple(sorted(CODECS))
