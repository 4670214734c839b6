"""Bytes of stored KV, by model and codec, as the store itself lays them out."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from cachetune_store.codecs import get_codec
from cachetune_store.layout import ChunkLayout, LayerSpec
from cachetune_store.remote.reader import BYTES_TOGETHER

CODECS = ("exact", "int8", "fp8", "int4")
MODELS = {
    "llama-3.1-8b": ("Llama 3.1 8B", 32, LayerSpec(8, 128, 128)),
    "llama-3.3-70b": ("Llama 3.3 70B", 80, LayerSpec(8, 128, 128)),
    "qwen2.5-7b": ("Qwen2.5 7B", 28, LayerSpec(4, 128, 128)),
    "mistral-7b": ("Mistral 7B", 32, LayerSpec(8, 128, 128)),
    "smollm2-135m": ("SmolLM2 135M", 30, LayerSpec(3, 64, 64)),
    "smollm2-1.7b": ("SmolLM2 1.7B", 24, LayerSpec(32, 64, 64)),
}
"""A name for people, layers and the widths of a layer, as the models' config.json files say."""


@dataclass(frozen=True)
class Size:
    """What a chunk takes.

    Attributes:
        layers: of the model.
        layer: bytes of a layer's rows.
        deviations: bytes of the deviations, which are stored beside the rows with `lead_in="auto"`.
        tokens: of the chunk.
    """

    layers: int
    layer: int
    deviations: int
    tokens: int

    @property
    def rows(self) -> int:
        """Bytes of all rows."""
        return self.layers * self.layer

    @property
    def whole(self) -> int:
        """Bytes of rows and deviations."""
        return self.rows + self.deviations

    @property
    def gigabytes(self) -> float:
        """GB of the rows of a million tokens."""
        return self.rows / self.tokens / 1000

    @property
    def reads(self) -> int:
        """Requests by which a remote place is read: one for the head, and one for as many layers as are worth a request."""
        return 1 + ceil(self.layers / ceil(BYTES_TOGETHER / self.layer))


def size_of(model: str, codec: str, tokens: int, dtype: str = "bfloat16") -> Size:
    """What a chunk of so many tokens takes."""
    _, layers, spec = MODELS[model]
    layout = ChunkLayout(tokens=tokens, layers=(spec,) * layers, dtype=dtype, codec=codec)
    rows = get_codec(codec).row_format(spec, dtype).size(tokens)
    return Size(layers, rows, 2 * layout.deviation_columns * tokens, tokens)
