"""The base class of codecs, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import StoreArgumentError, UnknownCodecError
from ..layout import HeadBytes, LayerSpec, RowFormat
from ..printing import shown

__all__ = ["Codec", "codec_names", "get_codec", "register_codec"]


class Codec(ABC):
    """Turns keys and values of one layer into rows of bytes and back.

    A row holds K and V of one token. It may share bytes, such as scales, with the other rows of its group. Any number of a layer's first
    rows can be decoded alone. Codecs know nothing of tiers and have no state.
    """

    name: str
    """Its name in files and in `ChunkStore(codec=...)`. If the meaning of rows changes, the codec needs a new name."""
    error: str
    """How far decoded numbers may be from the original ones, in words."""

    @abstractmethod
    def row_format(self, spec: LayerSpec, dtype: str | torch.dtype) -> RowFormat:
        """How many bytes a row takes, and how many a group of rows shares."""

    def head_bytes(self, spec: LayerSpec, dtype: str | torch.dtype, heads: slice) -> HeadBytes:
        """Which bytes decode() needs for these neighbouring heads; what it makes of the others' means nothing if only these are there.

        All bytes, unless a codec says more: then a GPU that has a part of the heads copies only what it needs.
        """
        form = self.row_format(spec, dtype)
        return HeadBytes.of([(0, form.row_bytes)], [(0, form.group_bytes)])

    @abstractmethod
    def encode(self, k: Tensor, v: Tensor) -> Tensor:
        """Bytes of `k` [n, heads, head_dim] and `v` [n, heads, v_head_dim]: uint8 [row_format().size(n)], on their device.

        Rows are given in the order in which they will be stored. The first one begins a group.
        """

    @abstractmethod
    def decode(
        self, encoded: Tensor, spec: LayerSpec, dtype: str | torch.dtype, pieces: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """K [n, heads, head_dim] and V [n, heads, v_head_dim] of `encoded`, on its device.

        Args:
            encoded: uint8 [bytes], contiguous: the first n rows of a layer as encode() wrote them, or several such pieces of
                different chunks. Each piece then begins row_format().span(rows) bytes behind the piece before it, and bytes
                in between are ignored.
            pieces: the number of rows of each piece; None: `encoded` is one piece.
        """

    def declare(self, tokens: int, spec: LayerSpec, dtype: str | torch.dtype) -> tuple[str, list[int]]:
        """How the file's header declares a layer of `tokens` rows: safetensors dtype and shape.

        These are bytes: one row of the shape for each row, or a single dimension for grouped rows. A codec whose rows are numbers of
        one dtype declares that dtype instead.
        """
        rows = self.row_format(spec, dtype)
        return "U8", [rows.size(tokens)] if rows.group_bytes else [tokens, rows.row_bytes]


CODECS: dict[str, Codec] = {}
"""The registered codecs by name."""


def register_codec(codec: Codec) -> None:
    """Register `codec` under its name. A name can't be given to another codec, because existing files would be misread."""
    if not isinstance(codec, Codec) or not isinstance(codec.name, str):
        raise StoreArgumentError(
            f"codec is {shown(codec)}, a {type(codec).__name__}; use an instance of a class of Codec with a name"
        )
    known = CODECS.get(codec.name)
    if known is not None and type(known) is not type(codec):
        raise StoreArgumentError(f"codec {shown(codec.name)} is already registered; give the new one another name")
    CODECS[codec.name] = codec


def get_codec(name: str) -> Codec:
    """The codec that is registered as `name`.

    Raises:
        UnknownCodecError: there is none. The message lists the registered ones.
    """
    try:
        return CODECS[name]
    except (KeyError, TypeError):  # TypeError: the value can't be a name
        raise UnknownCodecError(f"unknown codec {shown(name)}; registered: {', '.join(codec_names())}") from None


def codec_names() -> tuple[str, ...]:
    """Names of all registered codecs."""
    return tuple(sorted(CODECS))
