"""Tiny random models of every family the engine serves, and of some that it has to refuse.

A row is a config plus how to check it; `build` makes the model: float32, eval mode, the same weights for the
same row every time. Weights are scaled by fan-in, so activations keep unit size and attention is peaked: a
wrong position, row or mask moves the logits by 0.1 or more, while rounding moves them by about 1e-6.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

VOCAB = 200
BOS = 1
WINDOW = 16
"""Sliding window of every row that has one; tests use prompts several times as long."""
MAX_POSITIONS = 512

Config = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A supported model: `model_type` and `config` as transformers takes them.

    `tolerance` bounds the absolute error of logits (whose own size is about 1) against full prefill; mixtures
    of experts get more room, since their matrices' shapes depend on which tokens are computed together.
    """

    name: str
    model_type: str
    config: Config
    attn: str = "sdpa"
    tolerance: float = 1e-5
    sliding: bool = False

    def build(self) -> PreTrainedModel:
        """A fresh model; use `model_of` to share one between tests."""
        return _build(self.name, self.model_type, self.config, self.attn)


@dataclass(frozen=True)
class Refusal:
    """An unsupported model; the refusal must match `reason` (a regular expression, case-insensitive)."""

    name: str
    model_type: str
    config: Config
    reason: str
    attn: str = "eager"

    def build(self) -> PreTrainedModel:
        """A fresh model."""
        return _build(self.name, self.model_type, self.config, self.attn)


def _dense(**changes: Any) -> Config:
    """What most decoder configs share: 3 layers, 4 heads over 2 key-value heads, vocabulary of `VOCAB`."""
    config: Config = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": BOS,
        "eos_token_id": None,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return config | changes


def _rope(rope_type: str = "default", theta: float = 10_000.0, **more: Any) -> Config:
    return {"rope_type": rope_type, "rope_theta": theta, **more}


LLAMA3_ROPE = _rope(
    "llama3",
    500_000.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN_ROPE = _rope("yarn", factor=8.0, original_max_position_embeddings=64)
# A short chunk, run alone, would use the short factors; in the tests' prompts it has to use the long ones.
LONG_ROPE = _rope(
    "longrope",
    short_factor=[1.0, 1.1, 1.3, 1.6],
    long_factor=[1.0, 2.0, 4.0, 8.0],
    original_max_position_embeddings=64,
    factor=8.0,
    partial_rotary_factor=0.5,
)
SLIDING, FULL = "sliding_attention", "full_attention"

_FAMILIES: tuple[Family, ...] = (
    Family("llama", "llama", _dense(rope_parameters=_rope())),
    Family("llama-eager", "llama", _dense(rope_parameters=_rope()), attn="eager"),
    Family("llama-llama3", "llama", _dense(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)),
    Family("llama-yarn", "llama", _dense(rope_parameters=YARN_ROPE)),
    Family("llama-linear", "llama", _dense(rope_parameters=_rope("linear", factor=4.0), attention_bias=True)),
    Family("llama-head-dim", "llama", _dense(rope_parameters=_rope(), head_dim=20)),
    Family("mistral", "mistral", _dense(rope_parameters=_rope(), sliding_window=WINDOW), sliding=True),
    Family("mistral-full", "mistral", _dense(rope_parameters=_rope(), sliding_window=None)),
    Family("starcoder2", "starcoder2", _dense(rope_parameters=_rope(), sliding_window=WINDOW), sliding=True),
    Family("qwen2", "qwen2", _dense(rope_parameters=_rope(theta=1e6))),
    Family(
        "qwen2-sliding",
        "qwen2",
        _dense(
            rope_parameters=_rope(),
            use_sliding_window=True,
            sliding_window=WINDOW,
            layer_types=[FULL, SLIDING, SLIDING],
        ),
        sliding=True,
    ),
    Family("qwen3", "qwen3", _dense(rope_parameters=_rope(theta=1e6), head_dim=16)),
    Family(
        "gemma",
        "gemma",
        _dense(head_dim=16, num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=_rope()),
    ),
    Family(
        "gemma2",
        "gemma2",
        _dense(
            num_hidden_layers=4,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=WINDOW,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=10.0,
            tie_word_embeddings=True,
            rope_parameters=_rope(),
        ),
        attn="eager",  # the only one that caps attention logits
        sliding=True,
    ),
    Family(
        "gemma3",
        "gemma3_text",
        _dense(
            num_hidden_layers=4,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=WINDOW,
            layer_types=[SLIDING, SLIDING, FULL, SLIDING],
            tie_word_embeddings=True,
            rope_parameters={SLIDING: _rope(theta=1e4), FULL: _rope("linear", theta=1e6, factor=8.0)},
        ),
        sliding=True,
    ),
    Family(
        "phi3",
        "phi3",
        _dense(
            hidden_size=64,
            original_max_position_embeddings=MAX_POSITIONS,
            rope_parameters=_rope(partial_rotary_factor=0.5),
        ),
    ),
    Family(
        "phi3-sliding",
        "phi3",
        _dense(
            original_max_position_embeddings=MAX_POSITIONS,
            rope_parameters=_rope(),
            sliding_window=WINDOW,
        ),
        sliding=True,
    ),
    Family(
        "phi3-longrope",
        "phi3",
        _dense(hidden_size=64, original_max_position_embeddings=64, rope_parameters=LONG_ROPE),
    ),
    Family("phi", "phi", _dense(hidden_size=64, rope_parameters=_rope(partial_rotary_factor=0.5))),
    Family(
        "phi-qk-norm",
        "phi",
        _dense(
            hidden_size=64,
            num_key_value_heads=4,
            qk_layernorm=True,
            rope_parameters=_rope(partial_rotary_factor=0.5),
        ),
    ),
    Family(
        "gpt-neox",
        "gpt_neox",
        _dense(hidden_size=64, use_parallel_residual=True, rope_parameters=_rope(partial_rotary_factor=0.25)),
    ),
    Family(
        "gpt-neox-sequential",
        "gpt_neox",
        _dense(hidden_size=64, use_parallel_residual=False, rope_parameters=_rope(partial_rotary_factor=1.0)),
    ),
    Family("olmo2", "olmo2", _dense(rope_parameters=_rope(theta=5e5))),
    Family(
        "olmo3",
        "olmo3",
        _dense(
            num_hidden_layers=4,
            sliding_window=WINDOW,
            layer_types=[SLIDING, SLIDING, SLIDING, FULL],
            rope_parameters={SLIDING: _rope(theta=5e5), FULL: YARN_ROPE},
        ),
        sliding=True,
    ),
    # Unrotated keys on its full layers.
    Family(
        "exaone4",
        "exaone4",
        _dense(
            num_hidden_layers=4,
            sliding_window=WINDOW,
            layer_types=[SLIDING, SLIDING, SLIDING, FULL],
            rope_parameters=_rope(theta=1e6),
        ),
        sliding=True,
    ),
    Family(
        "granite",
        "granite",
        _dense(
            rope_parameters=_rope(),
            embedding_multiplier=3.0,
            residual_multiplier=0.5,
            attention_multiplier=0.3,
            logits_scaling=2.0,
        ),
    ),
    Family(
        "mixtral",
        "mixtral",
        _dense(rope_parameters=_rope(), num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
        tolerance=1e-4,
    ),
    Family(
        "mixtral-sliding",
        "mixtral",
        _dense(rope_parameters=_rope(), num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW),
        tolerance=1e-4,
        sliding=True,
    ),
    Family(
        "qwen2-moe",
        "qwen2_moe",
        _dense(
            rope_parameters=_rope(),
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        ),
        tolerance=1e-4,
    ),
    Family(
        "qwen3-moe",
        "qwen3_moe",
        _dense(
            rope_parameters=_rope(),
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[1],
        ),
        tolerance=1e-4,
    ),
    Family(
        "gpt-oss",
        "gpt_oss",
        _dense(
            num_hidden_layers=4,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=WINDOW,
            rope_parameters=YARN_ROPE | {"truncate": False},
        ),
        attn="eager",  # the only one that has its attention sinks
        tolerance=1e-4,
        sliding=True,
    ),
    Family(
        "smollm3",
        "smollm3",
        _dense(num_hidden_layers=4, rope_parameters=_rope(), no_rope_layers=[1, 0, 1, 0]),
    ),
    Family("cohere", "cohere", _dense(rope_parameters=_rope(), tie_word_embeddings=True, logit_scale=1.0)),
    Family(
        "cohere-qk-norm",
        "cohere",
        _dense(rope_parameters=_rope(), use_qk_norm=True, tie_word_embeddings=True, logit_scale=1.0),
    ),
    # Unrotated keys on its full layers.
    Family(
        "cohere2",
        "cohere2",
        _dense(
            num_hidden_layers=4,
            head_dim=12,
            sliding_window=WINDOW,
            layer_types=[SLIDING, SLIDING, SLIDING, FULL],
            rope_parameters=_rope(),
            tie_word_embeddings=True,
            logit_scale=1.0,
        ),
        sliding=True,
    ),
    Family("glm", "glm", _dense(head_dim=16, rope_parameters=_rope(partial_rotary_factor=0.5))),
    Family("glm4", "glm4", _dense(head_dim=16, rope_parameters=_rope(partial_rotary_factor=0.5))),
    Family("stablelm", "stablelm", _dense(hidden_size=64, rope_parameters=_rope(partial_rotary_factor=0.25))),
    Family(
        "stablelm-qk-norm",
        "stablelm",
        _dense(
            hidden_size=64,
            qk_layernorm=True,
            use_parallel_residual=True,
            rope_parameters=_rope(partial_rotary_factor=0.5),
        ),
    ),
)


def _known(rows: tuple[Any, ...]) -> tuple[Any, ...]:
    """Those that the installed transformers has: the oldest supported release knows fewer."""
    return tuple(row for row in rows if row.model_type in CONFIG_MAPPING)


FAMILIES: tuple[Family, ...] = _known(_FAMILIES)

_MLA = _dense(
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=12,
    moe_intermediate_size=32,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    rope_parameters=_rope(),
)
_TINY_IDS = {"bos_token_id": BOS, "eos_token_id": None, "pad_token_id": 0, "vocab_size": VOCAB}

_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "gpt2",
        "gpt2",
        _TINY_IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
        r"position",
    ),
    Refusal(
        "opt",
        "opt",
        _TINY_IDS
        | {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "word_embed_proj_dim": 32,
        },
        r"position",
    ),
    Refusal("bloom", "bloom", _TINY_IDS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}, r"alibi|position"),
    Refusal("deepseek-v2", "deepseek_v2", _MLA, r"latent|MLA"),
    Refusal("deepseek-v3", "deepseek_v3", _MLA, r"latent|MLA"),
    Refusal(
        "mamba",
        "mamba",
        _TINY_IDS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        r"state|mamba|recurrent|linear|attention",
    ),
    Refusal(
        "qwen3-next",
        "qwen3_next",
        _dense(
            num_hidden_layers=4,
            head_dim=16,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            rope_parameters=_rope(partial_rotary_factor=0.25),
        ),
        r"linear|recurrent|hybrid|state",
    ),
    Refusal(
        "jamba",
        "jamba",
        _dense(
            num_hidden_layers=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=2,
            num_experts_per_tok=1,
            mamba_d_state=4,
        ),
        r"mamba|linear|recurrent|hybrid|state",
    ),
    Refusal(
        "t5",
        "t5",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        },
        r"encoder",
    ),
    Refusal(
        "llama4",
        "llama4_text",
        _dense(
            num_hidden_layers=4,
            head_dim=16,
            intermediate_size_mlp=64,
            num_local_experts=2,
            attention_chunk_size=32,
            rope_parameters=_rope(),
        ),
        r"chunk",
    ),
    # Its frequencies depend on the longest prompt this process has seen: full prefill itself is not stable.
    Refusal(
        "llama-dynamic",
        "llama",
        _dense(rope_parameters=_rope("dynamic", factor=4.0), max_position_embeddings=64),
        r"dynamic",
    ),
    # They normalise keys after the rotation, which only looks like keys without one.
    Refusal("hunyuan", "hunyuan_v1_dense", _dense(head_dim=16, rope_parameters=_rope()), r"norm after"),
    Refusal("nanochat", "nanochat", _dense(rope_parameters=_rope()), r"norm after"),
    Refusal("dory", "dory", _dense(num_hidden_layers=4, hidden_size=64, head_dim=16), r"more than once"),
    Refusal(
        "gptj",
        "gptj",
        _TINY_IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
        r"rotary|attention",
    ),
)
REFUSALS: tuple[Refusal, ...] = _known(_REFUSALS)


def ids_of(rows: tuple[Family, ...] | tuple[Refusal, ...]) -> list[str]:
    """Names for `pytest.mark.parametrize(..., ids=...)`."""
    return [row.name for row in rows]


def family(name: str) -> Family:
    """The row of that name; KeyError lists the known ones."""
    for row in FAMILIES:
        if row.name == name:
            return row
    raise KeyError(f"no family {name!r}; known: {', '.join(ids_of(FAMILIES))}")


@cache
def model_of(name: str) -> PreTrainedModel:
    """The one model of a family that all tests of a process share: do not change its weights or config."""
    return family(name).build()


def random_ids(count: int, seed: int) -> list[int]:
    """`count` content tokens, never one of the special ids 0 and `BOS`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (count,), generator=generator).tolist()


def _build(name: str, model_type: str, changes: Config, attn: str) -> PreTrainedModel:
    # A deep copy, because transformers fills in nested dicts (rope parameters) in place.
    config = AutoConfig.for_model(model_type, **deepcopy(changes))
    make: Callable[..., PreTrainedModel] = (
        AutoModelForSeq2SeqLM.from_config if config.is_encoder_decoder else AutoModelForCausalLM.from_config
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(config, dtype=torch.float32, attn_implementation=attn).eval()
    _randomise(model, config, torch.Generator().manual_seed(zlib.crc32(name.encode())))
    # Greedy over the whole budget, whatever the family's defaults: ids of this vocabulary never end a text.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def _randomise(model: PreTrainedModel, config: PretrainedConfig, generator: torch.Generator) -> None:
    """Redraw every parameter, norms and biases too: a neutral element would hide a mistake."""

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator)

    embeddings = model.get_input_embeddings().weight
    for name, weight in model.named_parameters():
        if weight is embeddings:
            # Tied embeddings are the output layer too, whose logits should be about 1.
            weight.copy_(noise(weight) * (weight.shape[-1] ** -0.5 if config.tie_word_embeddings else 1.0))
        elif weight.dim() >= 2 and "norm" not in name:
            # gpt-oss keeps its experts as [expert, in, out]; experts' biases have two dimensions as well.
            transposed = config.model_type == "gpt_oss" and weight.dim() == 3
            fan_in = weight.shape[-2 if transposed else -1]
            gain = 0.1 if "bias" in name else 1.5 * fan_in**-0.5
            weight.copy_(noise(weight) * gain)
        else:
            weight.add_(noise(weight) * 0.2)
