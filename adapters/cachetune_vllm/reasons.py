"""Why a request, or what is left of it, is answered by vLLM alone. docs/vllm.md says of each reason what can be done."""

from __future__ import annotations

from enum import StrEnum


class Left(StrEnum):
    """A reason, as reports (`left`) and the metric `cachetune_vllm_requests_left_total` name it."""

    NOTHING_FOUND = "nothing found"
    MISSED = "missed"
    FEW = "few"
    SLOW_DISK = "slow disk"
    CACHED = "cached"
    SAME_PROMPT = "same prompt"
    ALL_RECOMPUTED = "all recomputed"
    BOUND = "bound"
    ASKED = "asked"
    SETTINGS = "settings"
    REFUSED = "refused"
    MEMORY = "memory"
    FAILED = "failed"
    GIVEN_UP = "given up"
    LORA = "lora"
    IMAGES = "images"
    EMBEDDINGS = "embeddings"
    POOLING = "pooling"
    PROMPT_LOGPROBS = "prompt logprobs"
    NO_PREFIX_CACHE = "no prefix cache"
    BEAM_SEARCH = "beam search"
    STREAMED_INPUT = "streamed input"
