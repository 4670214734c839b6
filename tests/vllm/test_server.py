"""`cachetune serve` as a process, asked over HTTP by the clients that people have."""

from __future__ import annotations

import concurrent.futures
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cachetune_rag import CacheTune
from tests import tiny
from tests.vllm.server import Server, asked, settings, text_of
from tests.vllm.test_connector import CHUNKS, encode, filled_store


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    model, store = filled_store(folder)
    server = Server(model, store, folder / "log")
    server.start()
    yield server
    server.end()


def test_a_chat_with_stored_chunks_reuses_them_and_says_so(server: Server) -> None:
    chunks = [CHUNKS[3], CHUNKS[1], CHUNKS[4]]
    status, answer = server.post(asked(server, text_of(chunks)))
    assert status == 200
    told = answer["kv_transfer_params"]["cachetune"]
    assert told["reused"] + told["recomputed"] == sum(len(encode(chunk)) for chunk in chunks)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == told["reused"]
    assert server.post(asked(server, "Hello."))[1].get("kv_transfer_params") is None


def test_all_recomputed_is_vllms_own_answer(server: Server) -> None:
    content = text_of(CHUNKS[:3], "And this?")
    texts = [
        server.post(asked(server, content, kv_transfer_params=params))[1]["choices"][0]["message"]["content"]
        for params in (settings(ratio=1), settings(reuse=False))
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("given", "said"), [({"ratoi": 1}, "'ratio'"), ({"ratio": 9}, "ratio is 9"), ({"tenant": "b"}, "tenant")]
)
def test_settings_that_cannot_be_used_are_refused_with_400(server: Server, given: dict[str, Any], said: str) -> None:
    status, answer = server.post(asked(server, text_of(CHUNKS[:2]), kv_transfer_params=settings(**given)))
    assert status == 400
    assert said in answer["error"]["message"]
    assert server.post(asked(server, "Hello."))[0] == 200


def test_the_openai_client_streams(server: Server) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-")
    body = asked(server, text_of([CHUNKS[5], CHUNKS[4], CHUNKS[0]], "In pieces?"))
    body.pop("ignore_eos")
    pieces = client.chat.completions.create(
        **body, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}
    )
    found, cached = "", 0
    for piece in pieces:
        found += piece.choices[0].delta.content or "" if piece.choices else ""
        cached = piece.usage.prompt_tokens_details.cached_tokens if piece.usage else cached
    answer = server.post(asked(server, text_of([CHUNKS[5], CHUNKS[0], CHUNKS[4]], "In pieces?")))[1]
    assert cached == answer["kv_transfer_params"]["cachetune"]["reused"] > 0  # a stream has no report of its own
    whole = client.chat.completions.create(**body, extra_body={"ignore_eos": True}).choices[0].message.content
    assert found == whole


def test_many_threads(server: Server) -> None:
    bodies = [asked(server, text_of([CHUNKS[(n + k) % 6] for k in (0, 2, 3)], f"Number {n}?")) for n in range(12)]
    one_by_one = [server.post(body)[1]["choices"][0]["message"]["content"] for body in bodies]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        together = [answer["choices"][0]["message"]["content"] for _, answer in pool.map(server.post, bodies)]
    assert together == one_by_one


def test_llama_index_and_langchain_reuse_by_their_stock_classes(server: Server) -> None:
    like = pytest.importorskip("llama_index.llms.openai_like")
    langchain = pytest.importorskip("langchain_openai")
    place = {"api_key": "-", "model": str(server.model)}
    llama = like.OpenAILike(api_base=f"{server.url}/v1", is_chat_model=True, max_tokens=4, **place)
    chat = langchain.ChatOpenAI(base_url=f"{server.url}/v1", max_tokens=4, **place)
    for number, ask in enumerate((llama.complete, chat.invoke)):
        before = server.metric("cachetune_vllm_requests_total")
        ask(text_of([CHUNKS[2], CHUNKS[3], CHUNKS[4 + number]], f"For framework {number}?"))
        assert server.metric("cachetune_vllm_requests_total") == before + 1


def test_llama_index_and_langchain_name_chunks_through_extra_body(server: Server) -> None:
    like = pytest.importorskip("llama_index.llms.openai_like")
    langchain = pytest.importorskip("langchain_openai")
    place = {"api_key": "-", "model": str(server.model)}
    llama = like.OpenAILike(api_base=f"{server.url}/v1", is_chat_model=True, max_tokens=4, **place)
    chat = langchain.ChatOpenAI(base_url=f"{server.url}/v1", max_tokens=4, **place)
    asks = (llama.complete, chat.invoke, lambda prompt, extra_body: chat.bind(extra_body=extra_body).invoke(prompt))
    for number, ask in enumerate(asks):
        text = f"A passage that nobody has stored, of which there are several: this one has the number {number}."
        missed = server.metric("cachetune_vllm_chunk_tokens_total", 'kind="missed"')
        named = {"kv_transfer_params": settings(chunks=[text, *CHUNKS[3:5]])}
        ask(text_of([text, *CHUNKS[3:5]], f"Which number, {number}?"), extra_body=named)
        assert server.metric("cachetune_vllm_chunk_tokens_total", 'kind="missed"') == missed + len(encode(text))


def test_metrics_count_tokens_and_reasons(server: Server) -> None:
    left = server.metric("cachetune_vllm_requests_left_total", 'reason="asked"')
    reused = server.metric("cachetune_vllm_chunk_tokens_total", 'kind="reused"')
    server.post(asked(server, text_of(CHUNKS[3:], "Left?"), kv_transfer_params=settings(reuse=False)))
    told = server.post(asked(server, text_of(CHUNKS[:3], "Counted?")))[1]["kv_transfer_params"]["cachetune"]
    assert server.metric("cachetune_vllm_requests_left_total", 'reason="asked"') == left + 1
    assert server.metric("cachetune_vllm_chunk_tokens_total", 'kind="reused"') == reused + told["reused"]


def test_documents_are_added_while_the_server_runs(server: Server) -> None:
    from transformers import AutoModelForCausalLM

    text = "A page that was written after the server had started, and that a nightly job has just precomputed for everybody."
    loaded = AutoModelForCausalLM.from_pretrained(server.model, dtype=torch.float32).eval()
    with CacheTune(loaded, tiny.tokenizer(), server.store) as engine:
        engine.precompute([text])
    until, number, told = time.monotonic() + 60, 0, None
    chunks = [text, *CHUNKS[2:5]]
    wanted = sum(len(encode(chunk)) for chunk in chunks)
    while time.monotonic() < until:
        number += 1
        # Another beginning each time: what vLLM has computed for an earlier try is not reused, but taken from its cache.
        content = f"Try {number}. {text_of(chunks)}"
        answer = server.post(asked(server, content, kv_transfer_params=settings()))[1]
        told = answer["kv_transfer_params"]["cachetune"]
        if told["reused"] + told.get("recomputed", 0) == wanted:
            return
        time.sleep(0.5)
    pytest.fail(f"the new chunk was not found: {told}")


def test_killed_and_started_again(server: Server) -> None:
    body = asked(server, text_of(CHUNKS[1:4], "Once more?"))
    before = server.post(body)[1]
    server.end(signal.SIGKILL)
    server.start()
    after = server.post(body)[1]
    assert after["choices"][0]["message"]["content"] == before["choices"][0]["message"]["content"]
    assert after["kv_transfer_params"]["cachetune"]["reused"] == before["kv_transfer_params"]["cachetune"]["reused"]
