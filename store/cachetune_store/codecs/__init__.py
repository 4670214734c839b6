"""Codecs: how keys and values become bytes. One file a codec; register_codec() adds more."""

from .base import Codec, codec_names, get_codec, register_codec
from .exact import ExactCodec
from .int8 import Int8Codec

__all__ = ["Codec", "ExactCodec", "Int8Codec", "codec_names", "get_codec", "register_codec"]

register_codec(ExactCodec())
register_codec(Int8Codec())
