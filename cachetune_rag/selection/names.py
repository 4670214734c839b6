"""The names of the selectors that come with the package. torch isn't imported, so that the command line starts quickly."""

from __future__ import annotations

EXPECTED_ERROR = "expected_error"
EXPECTED_ERROR_EARLY = "expected_error_early"
EXPECTED_ERROR_TOKENS = "expected_error_tokens"
PROBE = "probe"
FREQUENCY = "frequency"
KV_DEVIATION = "kv_deviation"
LAYER0_VALUE = "layer0_value"
CHUNK_HEAD = "chunk_head"
RANDOM = "random"
NONE = "none"
ALL = "all"

DEFAULT = EXPECTED_ERROR
"""What selector="auto" stands for."""
OFFLINE = FREQUENCY
"""The selector that goes by the ranking made when a chunk is precomputed."""
BUILT_IN = (
    EXPECTED_ERROR,
    EXPECTED_ERROR_EARLY,
    EXPECTED_ERROR_TOKENS,
    PROBE,
    FREQUENCY,
    KV_DEVIATION,
    LAYER0_VALUE,
    CHUNK_HEAD,
    RANDOM,
    NONE,
    ALL,
)
"""All of them, the recommended ones first."""
HELP = f"{EXPECTED_ERROR}, {FREQUENCY}, ... or auto"
"""The names in short, for the help of command line options."""
