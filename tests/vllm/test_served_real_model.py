"""The real SmolLM2-135M-Instruct behind `cachetune serve`, asked by the clients that people have: answers and how close they are."""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import pydoc_data.topics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cachetune_rag import CacheTune, Document, Splitter
from tests.vllm.server import Server, asked, settings, text_of

pytestmark = pytest.mark.real_model

QUERY = "What does the nonlocal statement do?"
TOKENS = 6


@pytest.fixture(scope="module")
def chunks(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A store, and four of its chunks. There are too few texts to choose lead-ins from, which keeps this short."""
    store = tmp_path_factory.mktemp("kv")
    with CacheTune.from_pretrained(smollm2_path, store, device="cpu") as engine:
        splitter = Splitter(lambda text: len(engine.prompts.encode(text)), 112)
        texts = [c for topic in ("nonlocal", "assert") for c in splitter.split(pydoc_data.topics.topics[topic])][:4]
        engine.precompute([Document("topics", texts)])
    return store, texts


@pytest.fixture(scope="module")
def server(
    smollm2_path: Path, chunks: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    # Prompts reuse their chunks however little that saves.
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(smollm2_path, chunks[0], log, ["--least-reused", "0"]) as server:
        yield server


@pytest.fixture(scope="module")
def contents(chunks: tuple[Path, list[str]]) -> Iterator[str]:
    """Messages with the chunks, each time in another order."""
    return (text_of(list(order), QUERY) for order in itertools.permutations(chunks[1]))


def ask(server: Server, content: str, **given: Any) -> dict[str, Any]:
    server.forget()  # prompts begin alike, and what vLLM has computed of one is taken as it is by the next
    more = {"max_tokens": TOKENS, "logprobs": True, "top_logprobs": 20, "kv_transfer_params": settings(**given)}
    status, answer = server.post(asked(server, content, **more))
    assert status == 200, answer
    return answer


def text(answer: dict[str, Any]) -> str:
    said: str = answer["choices"][0]["message"]["content"]
    return said


def report(answer: dict[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = answer["kv_transfer_params"]["cachetune"]
    return said


def first(answer: dict[str, Any]) -> dict[str, float]:
    """Log probabilities of the likeliest first tokens of an answer."""
    return {each["token"]: each["logprob"] for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


def divergence(plain: dict[str, float], ours: dict[str, float]) -> float:
    """How far the first token's odds are from the plain ones. A token that is not among our likeliest counts as the last of these."""
    least = min(ours.values())
    return sum(math.exp(odds) * (odds - ours.get(token, least)) for token, odds in plain.items())


def test_with_everything_recomputed_the_answer_is_vllms_own(server: Server, contents: Iterator[str]) -> None:
    content = next(contents)
    plain, whole = ask(server, content, reuse=False), ask(server, content, ratio=1)
    nearly = ask(server, content, ratio=0.999, selector="probe")
    assert text(whole) == text(nearly) == text(plain)
    # All but a token or two of each chunk were computed here, in vLLM's pages: next to nothing is left to differ.
    assert report(nearly)["reused"] > 0
    assert divergence(first(plain), first(nearly)) < 1e-2


def test_answers_stay_close_and_recomputing_brings_them_closer(server: Server, contents: Iterator[str]) -> None:
    total = {"none": 0.0, "auto": 0.0}
    for content in itertools.islice(contents, 2):
        plain = first(ask(server, content, reuse=False))
        for selector in total:
            answer = ask(server, content, selector=selector)
            assert report(answer)["missed"] == 0
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == report(answer)["reused"] > 200
            total[selector] += divergence(plain, first(answer))
        assert max(plain, key=plain.__getitem__) == max(first(answer), key=first(answer).__getitem__)
    assert 0 < total["auto"] < total["none"]


def test_the_clients_that_people_have_in_four_threads(server: Server, contents: Iterator[str]) -> None:
    openai = pytest.importorskip("openai").OpenAI(base_url=f"{server.url}/v1", api_key="-")
    like = pytest.importorskip("llama_index.llms.openai_like").OpenAILike
    langchain = pytest.importorskip("langchain_openai").ChatOpenAI
    model = {"api_key": "-", "model": str(server.model), "temperature": 0, "max_tokens": TOKENS}
    llama = like(api_base=f"{server.url}/v1", is_chat_model=True, **model)
    chat = langchain(base_url=f"{server.url}/v1", **model)

    def create(content: str, **more: Any) -> Any:
        message = [{"role": "user", "content": content}]
        return openai.chat.completions.create(
            model=str(server.model), messages=message, temperature=0, max_tokens=TOKENS, **more
        )

    def streamed(content: str) -> str:
        pieces = create(content, stream=True)
        return "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)

    asks: list[Callable[[str], str]] = [
        lambda content: create(content).choices[0].message.content,
        streamed,
        lambda content: llama.complete(content).text,
        lambda content: "".join(piece.delta or "" for piece in llama.stream_complete(content)),
        lambda content: str(chat.invoke(content).content),
        lambda content: "".join(str(piece.content) for piece in chat.stream(content)),
    ]
    each = list(itertools.islice(contents, len(asks)))
    server.forget()
    before = server.metric("cachetune_vllm_requests_total")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda ask, content: ask(content), asks, each))
    assert server.metric("cachetune_vllm_requests_total") == before + len(asks)  # all of them reused chunks
    assert answers == [text(ask(server, content)) for content in each]
