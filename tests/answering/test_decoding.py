"""Decoding: the same tokens as `model.generate`, and text pieces that join to the whole text."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_level, sentencepiece
from tokenizers import Tokenizer, decoders, models
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)
from transformers import PreTrainedTokenizerFast as Fast

from cachetune_rag.answering.decoding import DEFAULT_NEW_TOKENS, Decoded, TextStream, decode, decode_text, prepare
from cachetune_rag.errors import ConfigError, PromptError, UnsupportedModelError

EOS = 2
PROMPT = [1, 50, 60, 70, 80, 50, 60, 90, 91, 50]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_level()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def run(plan: Any) -> list[int]:
    """The tokens that a plan decodes with the model and a plain cache."""
    forward, first = _model_of(plan)
    return list(decode(forward, plan, first))


def reason(plan: Any) -> str:
    """Why the answer that a plan decodes ends."""
    forward, first = _model_of(plan)
    return [decoded.finish_reason for decoded in decode_text(forward, plan, first)][-1]


def _model_of(plan: Any) -> tuple[Callable[[int], torch.Tensor], torch.Tensor]:
    """The model's steps behind the plan's prompt, and the prompt's logits."""
    model, cache = llama(), DynamicCache()
    name = "cache" if "cache" in LlamaForCausalLM.forward.__annotations__ else "past_key_values"

    @torch.no_grad()
    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, **{name: cache}).logits[:, -1]

    return lambda token: forward(torch.tensor([[token]])), forward(plan.ids)


def generate(prompt: list[int] = PROMPT, **settings: Any) -> list[int]:
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": 24, "pad_token_id": EOS} | settings
    return llama().generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


def ours(prompt: list[int] = PROMPT, **settings: Any) -> list[int]:
    return run(prepare(llama(), byte_level(), prompt, **{"max_new_tokens": 24} | settings))


# -- the same as generate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 20, "eos_token_id": [EOS, *range(200, 300)]},
        {"eos_token_id": list(range(200, len(byte_level())))},
        {"bad_words_ids": [[i] for i in range(100, 400)]},
        {"suppress_tokens": list(range(100, 350))},
        {"forced_eos_token_id": EOS},
        {"exponential_decay_length_penalty": (3, 1.5)},
        {"max_new_tokens": 1},
        {"do_sample": False, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 5},
    ],
    ids=str,
)
def test_greedy(options: dict[str, Any]) -> None:
    expected = generate(**options)
    assert ours(**options) == expected
    assert (
        ours(generation_config=GenerationConfig(**options), max_new_tokens=options.get("max_new_tokens", 24))
        == expected
    )


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 3.0, "top_k": 0},
        {"do_sample": True, "temperature": 2.0, "top_p": 0.8, "top_k": 0},
        {"do_sample": True, "min_p": 0.1, "top_k": 7},
        {"do_sample": True, "repetition_penalty": 1.5, "temperature": 1.5},
        {"do_sample": True, "typical_p": 0.7, "min_new_tokens": 10},
    ],
    ids=str,
)
def test_sampling_with_the_same_seed(options: dict[str, Any]) -> None:
    torch.manual_seed(11)
    expected = generate(**options)
    assert ours(**options, seed=11) == expected
    torch.manual_seed(11)
    assert ours(**options) == expected
    assert ours(**options, seed=12) != expected


def test_a_seed_leaves_torchs_own_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    plan = prepare(llama(), byte_level(), PROMPT, do_sample=True, seed=5, max_new_tokens=8)
    assert run(plan) == run(plan)
    assert torch.equal(before, torch.get_rng_state())


def test_penalties_see_the_prompt() -> None:
    free = ours(max_new_tokens=1)[0]
    prompt = [*PROMPT[:-1], free, PROMPT[-1]]
    assert ours(prompt, repetition_penalty=1e6, max_new_tokens=12) == generate(
        prompt, repetition_penalty=1e6, max_new_tokens=12
    )
    assert not set(prompt) & set(ours(prompt, repetition_penalty=1e6, max_new_tokens=12))


def test_a_prompt_that_contains_the_padding_token() -> None:
    prompt = [1, EOS, 50, EOS, 60]
    assert ours(prompt, repetition_penalty=1.3) == generate(prompt, repetition_penalty=1.3)


def test_processors_and_criteria_of_the_caller() -> None:
    free = ours()
    banned = LogitsProcessorList([SuppressTokensLogitsProcessor([free[0]])])
    assert ours(logits_processor=banned) == generate(logits_processor=banned)

    def third(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.tensor([ids.shape[1] >= len(PROMPT) + 3])

    plan = prepare(llama(), byte_level(), PROMPT, max_new_tokens=9, stopping_criteria=[third])
    assert run(plan) == free[:3] == generate(stopping_criteria=StoppingCriteriaList([third]))
    assert reason(plan) == "stop"


def test_the_models_own_configuration_counts() -> None:
    model = llama()
    before = model.generation_config
    model.generation_config = GenerationConfig(
        eos_token_id=EOS, repetition_penalty=1.9, max_length=30, max_new_tokens=5, stop_strings=["zz"], do_sample=True
    )
    try:
        plan = prepare(model, byte_level(), PROMPT)
        assert (plan.max_new_tokens, plan.stop, plan.do_sample) == (5, ("zz",), True)
        assert next(type(p).__name__ for p in plan.logits_processor) == "RepetitionPenaltyLogitsProcessor"
        assert prepare(model, byte_level(), PROMPT, temperature=0, max_new_tokens=7).max_new_tokens == 7
        assert not prepare(model, byte_level(), PROMPT, temperature=0).do_sample
    finally:
        model.generation_config = before


def test_a_model_without_end_token_takes_the_tokenizers() -> None:
    model = llama()
    model.generation_config.eos_token_id = None
    try:
        assert prepare(model, byte_level(), PROMPT).eos_ids == {byte_level().eos_token_id}
    finally:
        model.generation_config.eos_token_id = EOS


def test_nothing_is_logged(caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> None:
    model = llama()
    model.generation_config.max_length = 100
    try:
        for options in (
            {},
            {"temperature": 0.5},
            {"temperature": 0},
            {"generation_config": GenerationConfig(do_sample=True, top_p=0.5), "temperature": 0},
        ):
            prepare(model, byte_level(), PROMPT, max_new_tokens=4, **options)
    finally:
        model.generation_config.max_length = None
    assert not caplog.records
    assert not [w for w in recwarn.list if "generat" in str(w.message)]


# -- where an answer ends ---------------------------------------------------------------------------------------------


def test_finish_reasons() -> None:
    free = ours()
    for options, expected, reason in (
        ({"max_new_tokens": 4}, free[:4], "length"),
        ({"eos_token_id": free[2]}, free[:3], "stop"),
        ({"eos_token_id": free[3], "max_new_tokens": 4}, free[:4], "stop"),
        ({"max_time": 1e-9}, free[:1], "length"),
    ):
        plan = prepare(llama(), byte_level(), PROMPT, **{"max_new_tokens": 24} | options)
        seen = []
        for decoded in _Recorded(plan):
            seen.append((decoded.token, decoded.finish_reason))
        assert [token for token, _ in seen] == expected
        assert [r for _, r in seen] == [""] * (len(expected) - 1) + [reason]


class _Recorded:
    """Runs `decode_text` step by step, and counts that no forward runs after the last token."""

    def __init__(self, plan: Any):
        self.plan = plan

    def __iter__(self) -> Iterator[Decoded]:
        model, forwards, tokens = llama(), 0, list(PROMPT)

        @torch.no_grad()
        def logits() -> torch.Tensor:
            return model(input_ids=torch.tensor([tokens])).logits[:, -1]

        def forward(token: int) -> torch.Tensor:
            nonlocal forwards
            forwards += 1
            tokens.append(token)
            return logits()

        count = 0
        for decoded in decode_text(forward, self.plan, logits()):
            count += 1
            yield decoded
        assert forwards == count - 1


@pytest.mark.parametrize("length", [1, 2, 5])
def test_stop_strings_stop_where_generate_stops(length: int) -> None:
    tokenizer = byte_level()
    text = tokenizer.decode(ours())
    start = next(i for i in range(4, len(text)) if "\ufffd" not in text[i : i + length])
    stop = text[start : start + length]
    expected = generate(stop_strings=[stop, "never"], tokenizer=tokenizer)
    plan = prepare(llama(), tokenizer, PROMPT, max_new_tokens=24, stop=["never", stop])
    tokens = run(plan)
    assert tokens == expected
    assert reason(plan) == "stop"
    assert joined(plan.text_stream(), tokens) == text[: text.index(stop)]


def test_stop_strings_of_a_configuration_are_added() -> None:
    config = GenerationConfig(stop_strings="a")
    assert prepare(llama(), byte_level(), PROMPT, generation_config=config, stop="b").stop == ("b", "a")


def test_an_end_token_that_is_not_special_has_no_text() -> None:
    tokenizer = byte_level()
    free = ours()
    plan = prepare(llama(), tokenizer, PROMPT, max_new_tokens=24, eos_token_id=free[4])
    tokens = run(plan)
    assert joined(plan.text_stream(), tokens) == tokenizer.decode(tokens[:-1], skip_special_tokens=True)


def test_closing_early_runs_nothing_more() -> None:
    plan = prepare(llama(), byte_level(), PROMPT, max_new_tokens=24)
    stream = decode(lambda token: pytest.fail("ran on"), plan, torch.zeros(1, len(byte_level())))
    next(stream)
    stream.close()


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sampled"),
    [
        ({}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 0}, False),
        ({"temperature": 0.0, "top_p": 0.9}, False),
        ({"top_p": 0.9}, True),
        ({"do_sample": False, "temperature": 0.7}, False),
        ({"temperature": None, "do_sample": None}, False),
        ({"generation_config": GenerationConfig(do_sample=True)}, True),
        ({"generation_config": GenerationConfig(do_sample=True), "temperature": 0}, False),
        ({"generation_config": GenerationConfig(do_sample=True, temperature=0.5), "do_sample": False}, False),
    ],
    ids=str,
)
def test_greedy_or_sampling(options: dict[str, Any], sampled: bool) -> None:
    assert prepare(llama(), byte_level(), PROMPT, **options).do_sample is sampled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "ask for beam search.*num_beams=1"),
        ({"num_beams": 4, "do_sample": True}, "beam sample|beam search"),
        (
            {"penalty_alpha": 0.6, "top_k": 4, "do_sample": False, "generation_config": GenerationConfig(top_k=4)},
            "contrastive",
        ),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5 is no setting of an answer"),
        ({"generation_config": GenerationConfig(guidance_scale=1.5)}, "guidance_scale is 1.5"),
        ({"generation_config": GenerationConfig(do_sample=True, num_return_sequences=3)}, "num_return_sequences is 3"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: use an int of at least 1"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens is 2\.5"),
        ({"max_length": 50}, "use max_new_tokens"),
        ({"stop_strings": ["a"]}, "use stop"),
        ({"temprature": 0.5}, "'temprature' is no generation setting: did you mean 'temperature'"),
        ({"attention_mask": 1}, "'attention_mask' is no generation setting"),
        ({"temperature": -1.0}, r"temperature is -1\.0: use a number from 0"),
        ({"temperature": 0, "do_sample": True}, "temperature is 0 with do_sample=True"),
        ({"top_p": 2.0}, r"top_p is 2\.0: use a number above 0, up to 1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0: use a number above 0"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"stop": [""]}, "stop contains ''"),
        ({"stop": [3]}, "stop contains 3"),
        ({"generation_config": {"top_k": 3}}, "use a transformers GenerationConfig"),
    ],
    ids=str,
)
def test_settings_that_cant_be_served(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(llama(), byte_level(), PROMPT, **options)


def test_default_length() -> None:
    assert prepare(llama(), byte_level(), PROMPT).max_new_tokens == DEFAULT_NEW_TOKENS


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(PromptError, match="no tokens"):
        prepare(llama(), byte_level(), [])


def test_a_model_that_cant_generate_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaModel can't generate"):
        prepare(llama().model, byte_level(), PROMPT)


# -- text -------------------------------------------------------------------------------------------------------------


def pieces(stream: TextStream, tokens: list[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.finish()]


def joined(stream: TextStream, tokens: list[int]) -> str:
    return "".join(pieces(stream, tokens))


@cache
def wordpiece() -> Fast:
    words = ["[UNK]", "do", "n", "'", "t", "##t", "hello", ".", ",", "!", "we", "ve", "'ve", "##s", "n't", "a"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return Fast(tokenizer_object=tokenizer, unk_token="[UNK]", clean_up_tokenization_spaces=True)


TOKENIZERS = {
    "byte-level": byte_level,
    "metaspace": sentencepiece,
    "legacy": lambda: sentencepiece(legacy=True),
    "wordpiece with clean-up": wordpiece,
}


@pytest.fixture(params=TOKENIZERS, name="tokenizer")
def _tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("seed", range(12))
def test_pieces_of_random_tokens_join_to_the_text(tokenizer: Any, seed: int) -> None:
    draw = random.Random(seed)
    tokens = [draw.randrange(len(tokenizer)) for _ in range(draw.choice([1, 3, 40, 400]))]
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert joined(TextStream(tokenizer), tokens) == whole
    for _ in range(5):
        start = draw.randrange(len(whole) + 1)
        stop = [whole[start : start + draw.choice([1, 2, 7])] or "x", "never seen"]
        if "\ufffd" in stop[0]:
            continue
        stream = TextStream(tokenizer, stop)
        assert joined(stream, tokens) == whole[: whole.find(stop[0]) if stop[0] in whole else len(whole)]
        assert stream.stopped is (stop[0] in whole)


TEXT = "Héllo wörld 🙂👩‍👩‍👧 日本語のテキスト, it's  two  spaces\r\n\tand a tab — «quoted» … ไทย 🇫🇷. "


@pytest.mark.parametrize("name", ["byte-level", "metaspace", "legacy"])
def test_pieces_of_text_never_show_half_a_character(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    tokens = tokenizer.encode(TEXT * 12, add_special_tokens=False)
    found = pieces(TextStream(tokenizer), tokens)
    assert "".join(found) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert "\ufffd" not in "".join(found)
    assert sum(map(bool, found)) > 50


def test_plain_text_comes_at_once() -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode("The river Seine runs")
    assert [bool(piece) for piece in pieces(TextStream(tokenizer), tokens)] == [True] * len(tokens) + [False]


def test_special_tokens_have_no_text() -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode("<|im_start|>a<|im_end|>b")
    assert joined(TextStream(tokenizer), tokens) == "ab"


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("Hello there<|im_end|>\nUser: hi", "<|im_end|>\nUser:", "Hello there"),
        ("abcde<|im_end|>xyz tail", "cde<|im_end|>xyz", "ab"),
        ("<|im_start|>a<|im_end|>\nb<|im_start|>c", "a<|im_end|>\nb<|im_start|>", ""),
        ("a much longer text é<|im_end|>日本 b", "é<|im_end|>日本", "a much longer text "),
    ],
)
def test_what_may_begin_a_stop_string_with_a_special_token_is_held_back_whole(text: str, stop: str, shown: str) -> None:
    tokenizer = byte_level()
    stream = TextStream(tokenizer, [stop])
    assert joined(stream, tokenizer.encode(text)) == shown
    assert stream.stopped


def test_long_answers_stay_cheap() -> None:
    tokenizer = byte_level()
    stream = TextStream(tokenizer)
    longest = 0
    for token in tokenizer.encode(TEXT * 60):
        stream.push(token)
        longest = max(longest, stream.window)
    assert longest < 200


def test_the_beginning_of_a_stop_string_is_held_back_and_let_go() -> None:
    tokenizer = byte_level()
    stream = TextStream(tokenizer, ["</answer>"])
    shown = ""
    for character in "a</ans":
        for token in tokenizer.encode(character):
            shown += stream.push(token)
    assert shown == "a"
    for token in tokenizer.encode("x"):
        shown += stream.push(token)
    assert shown == "a</ansx"
    for token in tokenizer.encode("</answer>tail", split_special_tokens=True):
        shown += stream.push(token)
    assert shown == "a</ansx"
    assert stream.stopped
    assert stream.finish() == ""


@given(st.text(alphabet="ab<", max_size=30), st.lists(st.text(alphabet="ab<", min_size=1, max_size=4), max_size=3))
@settings(max_examples=150, deadline=None)
def test_the_first_stop_string_wins(text: str, stop: list[str]) -> None:
    tokenizer = byte_level()
    tokens = [token for character in text for token in tokenizer.encode(character)]
    # The answer ends with the token that completes a stop string, whichever string begins first.
    ends = [i for i in range(len(text) + 1) if any(text[:i].endswith(s) for s in stop)]
    expected = text
    if ends:
        seen = text[: ends[0]]
        expected = seen[: min(seen.find(s) for s in stop if s in seen)]
    assert joined(TextStream(tokenizer, stop), tokens) == expected


def test_invalid_bytes_change_a_whole_run() -> None:
    tokenizer = sentencepiece()
    run = [tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in "é".encode()]
    broken = [*run, tokenizer.convert_tokens_to_ids("<0xE2>"), *tokenizer.encode("a", add_special_tokens=False)]
    assert joined(TextStream(tokenizer), broken) == tokenizer.decode(broken)
    special = [*run, tokenizer.eos_token_id, *broken[2:]]
    assert joined(TextStream(tokenizer), special) == tokenizer.decode(special, skip_special_tokens=True)
