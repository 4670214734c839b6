"""Codecs: how keys and values are written as bytes. Each codec has a file; register_codec() adds others."""

from .base import Codec, codec_names, get_codec, register_codec
from .exact import ExactCodec
from .fp8 import Fp8Codec
from .int4 import Int4Codec
from .int8 import Int8Codec

__all__ = [
    "Codec",
    "ExactCodec",
    "Fp8Codec",
    "Int4Codec",
    "Int8Codec",
    "codec_names",
    "get_codec",
    "register_codec",
]

for _codec in (ExactCodec(), Int8Codec(), Fp8Codec(), Int4Codec()):
    register_codec(_codec)
