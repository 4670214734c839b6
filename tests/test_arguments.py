"""Every argument of the public interface is given invalid values. Each raises an error of this project that says so, never another one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from odd_values import accepted, foreign, hard_values, odd_values
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Chunk, ConfigError, Document, PromptBuilder, Splitter, Text
from cachetune_rag.text.files.corpus import Corpus, read_passage, read_text

CHUNKS = ["The lighthouse was built in 1871 by three brothers.", "It was sold."]
USER = {"role": "user", "content": "Who?"}
SAMPLE = {"query": "Who?", "chunks": CHUNKS[:1]}
Call = Callable[[CacheTune, Any], Any]


@pytest.fixture(scope="module")
def engine() -> Iterator[CacheTune]:
    with CacheTune(llama(layers=1, max_positions=160), tokenizer(), lead_in="first_token") as made:
        made.precompute(Document("d", CHUNKS))
        yield made


def request(name: str) -> Call:
    return lambda e, v: e.generate(**{"query": "Who?", "chunks": CHUNKS[:1], "max_new_tokens": 1, name: v})


def prefill(name: str) -> Call:
    return lambda e, v: e.prefill(**{"query": "Who?", "chunks": CHUNKS[:1], name: v})


def full(name: str) -> Call:
    return lambda e, v: e.full_prefill(**{"query": "Who?", "chunks": CHUNKS[:1], name: v})


def calibrate(name: str) -> Call:
    return lambda e, v: e.calibrate(**{"samples": [SAMPLE], "ratios": [1.0], "tokens": 1, name: v})


def warmup(name: str) -> Call:
    return lambda e, v: e.warmup(**{name: v})


def messages(name: str) -> Call:
    return lambda e, v: e.prompt_from_messages(**{"messages": [USER], name: v})


def field(name: str) -> Call:
    return lambda e, v: e.prompt_from_messages([{**USER, name: v}])


def made(name: str) -> Call:
    def make(engine: CacheTune, value: Any) -> None:
        given = {"model": engine.adapter.model, "tokenizer": engine.tokenizer, "lead_in": "first_token", name: value}
        with CacheTune(**given):
            pass

    return make


def loaded(name: str) -> Call:
    return lambda e, v: CacheTune.from_pretrained(**{"model": "/nowhere/at/all", name: v})


def builder(name: str) -> Call:
    return lambda e, v: PromptBuilder(**{"tokenizer": e.tokenizer, name: v})


def build(name: str) -> Call:
    return lambda e, v: e.prompts.build(**{"query": "Who?", "chunks": CHUNKS, name: v})


def tune(name: str) -> Call:
    # What can be used would be measured, which takes long: a tier that isn't there ends it.
    return lambda e, v: e.tune(**{"tier": "disk", name: v})


REQUEST = (
    "query", "chunks", "prefix", "prompt", "ratio", "selector", "reuse", "max_new_tokens", "stop", "generation_config", "seed",
    "logits_processor", "stopping_criteria", "do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p",
    "repetition_penalty", "no_repeat_ngram_size", "eos_token_id", "pad_token_id", "forced_eos_token_id", "bad_words_ids",
    "suppress_tokens", "sequence_bias", "min_new_tokens", "max_time", "num_beams", "exponential_decay_length_penalty",
    "watermarking_config", "max_length", "stop_strings", "guidance_scale", "is_assistant", "rato",
)  # fmt: skip
ENGINE = (
    "model", "tokenizer", "prompt_template", "chat_template_kwargs", "chunk_separator", "lead_in", "tenant", "batch_tokens",
    "cuda_kernels", "fidelity_sample", "read_timeout", "codec", "host_budget", "disk_budget", "device_budget", "device",
    "read_memory", "pin_memory", "direct_io",
)  # fmt: skip


def looked_up(engine: CacheTune, value: Any) -> None:
    with engine.stream("Who?", CHUNKS, max_new_tokens=1) as stream:
        stream.looked_up = value
        list(stream)


CALLS: dict[str, Call] = {
    **{f"generate({name}=)": request(name) for name in REQUEST},
    **{f"stream({name}=)": (lambda e, v, n=name: e.stream("Who?", **{n: v})) for name in ("chunks", "prefix", "prompt", "ratio", "stop")},
    **{f"prefill({name}=)": prefill(name) for name in ("query", "chunks", "prefix", "prompt", "ratio", "selector", "tools")},
    **{f"full_prefill({name}=)": full(name) for name in ("query", "chunks", "prefix", "prompt")},
    **{f"calibrate({name}=)": calibrate(name) for name in ("bound", "measure", "selector", "ratios", "tokens", "quantile", "progress")},
    "calibrate(samples)": lambda e, v: e.calibrate(v, ratios=[1.0], tokens=1),
    "calibrate([sample])": lambda e, v: e.calibrate([v], ratios=[1.0], tokens=1),
    "calibrate([chunks])": lambda e, v: e.calibrate([{"query": "q", "chunks": v}], ratios=[1.0], tokens=1),
    "calibrate([prefix])": lambda e, v: e.calibrate([{**SAMPLE, "prefix": v}], ratios=[1.0], tokens=1),
    **{f"tune({name}=)": tune(name) for name in ("samples", "tier", "selector", "r_min", "r_max", "rounds", "tokens", "progress")},
    **{f"warmup({name}=)": warmup(name) for name in ("computed_tokens", "prompt_lengths", "selector")},
    **{f"prompt_from_messages({name}=)": messages(name) for name in ("messages", "recognise", "retrieved", "tools", "chat_template", "add_generation_prompt", "continue_final_message")},
    **{f"prompt_from_messages([{{{name}}}])": field(name) for name in ("role", "content", "tool_calls", "tool_call_id", "name")},
    "prompt_from_messages([message])": lambda e, v: e.prompt_from_messages([v]),
    "prompt_from_messages([content])": lambda e, v: e.prompt_from_messages([{"role": "user", "content": [v]}]),
    "prompt_from_messages(recognise=False)": lambda e, v: e.prompt_from_messages(v, recognise=False),
    "prompt_from_text(text)": lambda e, v: e.prompt_from_text(v),
    "prompt_from_text([text])": lambda e, v: e.prompt_from_text([v]),
    "prompt_from_text(recognise=False)": lambda e, v: e.prompt_from_text(v, recognise=False),
    "prompt_from_text(recognise=)": lambda e, v: e.prompt_from_text("a", recognise=v),
    "prompt_from_text(retrieved=)": lambda e, v: e.prompt_from_text("a", retrieved=v),
    "prompt_from_text(retrieved=[])": lambda e, v: e.prompt_from_text("a", retrieved=[v]),
    "prompt_from_text([Text])": lambda e, v: e.prompt_from_text([Text(v)]),
    "prompt_from_text([Chunk])": lambda e, v: e.prompt_from_text([Chunk(v)]),
    "Chunk(document=)": lambda e, v: e.prompts.build(query="q", chunks=[Chunk("a", v)]),
    "retrieved=[Chunk]": lambda e, v: e.prompt_from_text("a", retrieved=[Chunk(v, "d")]),
    "retrieved=[Chunk(document=)]": lambda e, v: e.prompt_from_text("a" * 40, retrieved=[Chunk("a" * 40, v)]),
    "precompute(documents)": lambda e, v: e.precompute(v),
    "precompute([document])": lambda e, v: e.precompute([v]),
    "precompute(replace=)": lambda e, v: e.precompute("a", replace=v),
    "precompute(progress=)": lambda e, v: e.precompute("a", progress=v),
    "Document(id)": lambda e, v: e.precompute(Document(v, ["a"])),
    "Document(chunks)": lambda e, v: e.precompute(Document("x", v)),
    "remove(document_id)": lambda e, v: e.remove(v),
    "remove(missing_ok=)": lambda e, v: e.remove("nothing", missing_ok=v),
    "generate_many(requests)": lambda e, v: list(e.generate_many(v, max_new_tokens=1)),
    "generate_many([request])": lambda e, v: list(e.generate_many([v], max_new_tokens=1)),
    "generate_many([chunks])": lambda e, v: list(e.generate_many([SAMPLE, {"query": "q", "chunks": v}], max_new_tokens=1)),
    "generate_many([ratio])": lambda e, v: list(e.generate_many([SAMPLE, {**SAMPLE, "ratio": v}], max_new_tokens=1)),
    "generate_many([prompt])": lambda e, v: list(e.generate_many([SAMPLE, {"prompt": v}], max_new_tokens=1)),
    "generate_many(max_new_tokens=)": lambda e, v: list(e.generate_many([{**SAMPLE, "max_new_tokens": 1}], max_new_tokens=v)),
    "prefetch(chunks)": lambda e, v: e.prefetch(v),
    "prefetch([chunk])": lambda e, v: e.prefetch([v]),
    "prefetch(prompt=)": lambda e, v: e.prefetch(prompt=v),
    "prefetch().wait": lambda e, v: v is None or e.prefetch(CHUNKS).wait(v),
    "flush(timeout)": lambda e, v: e.flush(v),
    "calibrated_ratio(selector)": lambda e, v: e.calibrated_ratio(v),
    **{f"CacheTune({name}=)": made(name) for name in ENGINE},
    **{f"from_pretrained({name}=)": loaded(name) for name in ("model", "gguf_file", "device", "dtype", "revision", "rato")},
    **{f"PromptBuilder({name}=)": builder(name) for name in ("tokenizer", "template", "chunk_separator", "instructions", "chat_template_kwargs")},
    **{f"prompts.build({name}=)": build(name) for name in ("query", "chunks", "prefix", "tools", "chat_template", "nothing")},
    "prompts.build_messages": lambda e, v: e.prompts.build_messages(v),
    "prompts.build_text": lambda e, v: e.prompts.build_text(v),
    "prompts.encode": lambda e, v: e.prompts.encode(v),
    "prompts.split_template": lambda e, v: e.prompts.split_template(v),
    "Splitter(count)": lambda e, v: Splitter(v).split("Some text. " * 9),
    "Splitter(chunk_tokens)": lambda e, v: Splitter(len, v),
    "Splitter.split": lambda e, v: Splitter(len).split(v),
    "Corpus.scan": lambda e, v: Corpus.scan(v),
    "Corpus.scan of one": lambda e, v: list(Corpus.scan([v]).documents()),
    "read_passage": lambda e, v: read_passage(v),
    "read_text": lambda e, v: read_text(v),
    "AnswerStream.looked_up": looked_up,
}  # fmt: skip


CALLBACKS = ("progress", "(count)", "looked_up")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_no_argument_ends_in_a_foreign_error(
    engine: CacheTune, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # "x" is a path
    # What a callback of the caller's raises is the caller's.
    values = [
        value
        for value in [*odd_values(), *hard_values()]
        if not (callable(value) and any(part in name for part in CALLBACKS))
    ]
    assert foreign(lambda value: CALLS[name](engine, value), values) == []


FLAGS = [None, 0, 1, "yes", "False", b"", [], object()]
SECONDS = ["x", True, -1, float("nan"), float("inf"), 10**400, [], b"1"]
REFUSED: dict[str, tuple[Call, list[Any]]] = {
    "reuse": (request("reuse"), FLAGS),
    "do_sample": (request("do_sample"), ["yes", 1, [True]]),
    "recognise": (lambda e, v: e.prompt_from_text("a", recognise=v), FLAGS),
    "recognise of messages": (messages("recognise"), FLAGS),
    "replace": (lambda e, v: e.precompute("a", replace=v), FLAGS),
    "missing_ok": (lambda e, v: e.remove("nothing", missing_ok=v), FLAGS),
    "cuda_kernels": (made("cuda_kernels"), FLAGS),
    "progress": (lambda e, v: e.precompute([], progress=v), ["x", 3, True, []]),
    "flush": (lambda e, v: e.flush(v), SECONDS),
    "wait": (lambda e, v: e.prefetch(CHUNKS).wait(v), SECONDS),
    "read_timeout of a store in memory": (made("read_timeout"), [*SECONDS, 0]),
    "tenant": (made("tenant"), [None, 3, b"x", "\ud800", []]),
    "lead_in": (made("lead_in"), [None, b"x", "x", 3, [None], ["a"], [-1], [10**6], [1.5], [True], {}]),
    "computed_tokens": (warmup("computed_tokens"), ["x", None, -1, 0, 1.5, True, 10**30]),
    "prompt_lengths": (warmup("prompt_lengths"), ["x", None, 3, ["a"], [None], [-1], [1.5], [True]]),
    "documents": (lambda e, v: e.precompute(v), [None, b"x", b"", bytearray(b""), range(0), {}, 3, [b"x"], [None]]),
    "store": (made("store"), ["", b"x", 5, ["a"], True, "a\0b", {}]),
    "samples": (lambda e, v: e.calibrate(v), [None, "x", b"", {}, 3, [None], []]),
    "requests": (lambda e, v: e.generate_many(v), [None, "x", b"", {}, 3]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_be_meant_is_not_taken_silently(engine: CacheTune, name: str) -> None:
    call, values = REFUSED[name]
    assert accepted(lambda value: call(engine, value), values) == []


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("rato", "ratio"),
        ("chunk", "chunks"),
        ("selektor", "selector"),
        ("max_tokens", "max_new_tokens"),
        ("temprature", "temperature"),
        ("stops", "stop"),
        ("sed", "seed"),
    ],
)
def test_a_misspelt_argument_of_a_request_is_told_the_nearest_one(engine: CacheTune, wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"{wrong!r} is no .*did you mean {right!r}"):
        engine.generate("Who?", CHUNKS, **{wrong: 0.1})


@pytest.mark.parametrize("method", ["prefill", "full_prefill", "explain"])
@pytest.mark.parametrize("laid_out", [False, True])
def test_what_only_an_answer_takes_is_said_to_belong_to_it(engine: CacheTune, method: str, laid_out: bool) -> None:
    given: dict[str, Any] = {"query": "Who?", "chunks": CHUNKS[:1]}
    if laid_out:
        given = {"prompt": engine.prompts.build(**given)}
    call = getattr(engine, method)
    names = {*inspect.signature(engine.stream).parameters, "temperature", "do_sample", "seed"} - {"sampling"}
    for name in names - set(inspect.signature(call).parameters):
        with pytest.raises(
            ConfigError, match=f"'{name}' is an argument of generate, generate_many and stream, and this"
        ):
            call(**given, **{name: 0.5})
