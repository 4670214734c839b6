"""Changes that others make to a tokenizer change neither an engine's ids nor the fingerprint in its keys."""

from __future__ import annotations

import copy
import hashlib
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import byte_level, sentencepiece
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Document
from cachetune_rag.model.loaded.fingerprint import tokenizer_fingerprint
from cachetune_rag.text.prompts.prompt import PromptBuilder
from cachetune_rag.text.tokenizer import ContentTokenizer

TEXTS = ["The dam is 214 metres high. " * 3, "Salmon climb a ladder of 36 steps. " * 3]


def truncate(made: Any) -> None:
    made.pad_token = made.eos_token
    made(TEXTS, padding=True, truncation=True, max_length=8)


def pad_to_length(made: Any) -> None:
    made.pad_token = made.eos_token
    made(TEXTS[0][:10], padding="max_length", max_length=512)
    made.padding_side = made.truncation_side = "left"


def add_padding_token(made: Any) -> None:
    made.add_special_tokens({"pad_token": "[PAD]"})


def pad_with_an_own_token(made: Any) -> None:
    made.pad_token = made.eos_token


def set_chat_template(made: Any) -> None:
    made.chat_template = (made.chat_template or "") + "{# a comment #}"


def encode_without_special_tokens(made: Any) -> None:
    made.encode(TEXTS[0], split_special_tokens=True)


def limit_length(made: Any) -> None:
    made.model_max_length = 16


CHANGES = [
    truncate, pad_to_length, add_padding_token, pad_with_an_own_token, set_chat_template, encode_without_special_tokens,
    limit_length,
]  # fmt: skip
MAKERS = [tokenizer, byte_level, sentencepiece]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_calls_leave_in_a_tokenizer_is_no_part_of_it(
    change: Callable[[Any], None], make: Callable[[], Any]
) -> None:
    made = copy.deepcopy(make())
    clean = tokenizer_fingerprint(made)
    expected = PromptBuilder(made).build(query="How high?", chunks=TEXTS)
    change(made)
    state = made.backend_tokenizer.to_str()
    assert tokenizer_fingerprint(made) == clean
    prompt = PromptBuilder(made).build(query="How high?", chunks=TEXTS)
    assert prompt.ids == expected.ids
    assert prompt.chunk_ids == expected.chunk_ids
    assert made.backend_tokenizer.to_str() == state  # and the caller's own stays as it is


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_clean_tokenizers_fingerprint_is_that_of_its_definition(make: Callable[[], Any]) -> None:
    made = make()
    definition = f"{type(made).__name__}|{copy.deepcopy(made).backend_tokenizer.to_str()}"
    assert tokenizer_fingerprint(made) == hashlib.sha256(definition.encode()).hexdigest()


def test_tokens_that_content_can_have_are_part_of_it() -> None:
    made = copy.deepcopy(byte_level())
    clean = tokenizer_fingerprint(made)
    made.add_tokens(["metres"])
    assert tokenizer_fingerprint(made) != clean


def test_a_store_is_found_again_whatever_was_done_to_the_tokenizer(tmp_path: Path) -> None:
    with CacheTune(llama(), tokenizer(), tmp_path, lead_in="first_token") as engine:
        engine.precompute([Document("a", TEXTS)])
    for change in CHANGES:
        made = copy.deepcopy(tokenizer())
        change(made)
        with CacheTune(llama(), made, tmp_path, lead_in="first_token") as engine:
            report = engine.generate("How high?", TEXTS, max_new_tokens=1).report
        assert (report.missed, report.prompt_tokens > 0) == (0, True), change.__name__


def test_what_happens_to_the_callers_tokenizer_later_has_no_effect() -> None:
    made = copy.deepcopy(tokenizer())
    with CacheTune(llama(), made, None, lead_in="first_token") as engine:
        prompt = engine.prompts.build(query="How high?", chunks=TEXTS)
        answer = engine.generate(prompt=prompt, max_new_tokens=8)
        made.add_tokens(["metres", "How", "e", "a"], special_tokens=True)
        made.chat_template = "{{ raise_exception('gone') }}"
        made.add_bos_token = False
        for change in CHANGES:
            change(made)
        assert engine.prompts.build(query="How high?", chunks=TEXTS) == prompt
        assert engine.generate("How high?", TEXTS, max_new_tokens=8).text == answer.text
        assert engine.tokenizer is not made


def test_users_of_one_tokenizer_dont_disturb_each_other() -> None:
    made = copy.deepcopy(byte_level())
    made.pad_token = made.eos_token
    builders = [PromptBuilder(made) for _ in range(2)]
    expected = builders[0].build(query="How high?", chunks=TEXTS)
    errors: list[Exception] = []
    done = threading.Event()

    def build(builder: PromptBuilder) -> None:
        try:
            for i in range(60):
                prompt = builder.build(query="How high?", chunks=[*TEXTS, f"{i} <|im_end|>"])
                assert prompt.chunk_ids[:2] == expected.chunk_ids
        except Exception as error:
            errors.append(error)

    def use() -> None:
        while not done.is_set():
            made(TEXTS, padding=True, truncation=True, max_length=5)
            made.encode(TEXTS[0], split_special_tokens=True)

    user = threading.Thread(target=use)
    threads = [threading.Thread(target=build, args=(builder,)) for builder in builders * 2]
    user.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    user.join()
    assert errors == []


def test_short_texts_do_not_fill_memory_either(monkeypatch):
    """Each entry of the cache counts with all the memory that it takes, not only with its ids."""
    monkeypatch.setattr("cachetune_rag.text.tokenizer._REMEMBERED_BYTES", 2 << 20)
    content = ContentTokenizer(tokenizer())
    content.encode("-1?")
    tracemalloc.start()
    try:
        for number in range(10_000):
            content.encode(f"{number}?")
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 1 << 19 < held < 2.5 * (1 << 20)
