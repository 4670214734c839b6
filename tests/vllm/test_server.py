"""`cachetune serve` as a process, asked over HTTP by the clients that people have."""

from __future__ import annotations

import concurrent.futures
import json
import math
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch

from cachetune_rag import CacheTune, Document
from cachetune_rag.explaining import html_page
from cachetune_rag.explaining.served import explanation_of
from tests import tiny
from tests.vllm.conftest import TinyVLLM
from tests.vllm.server import Server, asked, settings, text_of, value_of
from tests.vllm.test_connector import (
    CHUNKS,
    Served,
    encode,
    filled_store,
    prompt_of,
    report,
    shuffled,
    transfer,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its store is encrypted; those of other files' tests are not."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "key").write_text("5f" * 32)
    model, store = filled_store(folder, store_key=folder / "key", encrypt=True)
    with Server(model, store, folder / "log", ["--store-key", str(folder / "key"), "--encrypt"]) as server:
        yield server


def sealed(server: Server) -> dict[str, Any]:
    """What opens the server's store."""
    return {"store_key": str(server.store.parent / "key"), "encrypt": True}


def test_a_chat_with_stored_chunks_reuses_them_and_says_so(server: Server) -> None:
    chunks = [CHUNKS[3], CHUNKS[1], CHUNKS[4]]
    status, answer = server.post(asked(server, text_of(chunks)))
    assert status == 200
    told = answer["kv_transfer_params"]["cachetune"]
    assert told["reused"] + told["recomputed"] == sum(len(encode(chunk)) for chunk in chunks)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == told["reused"]
    assert server.post(asked(server, "Hello."))[1].get("kv_transfer_params") is None


def test_an_explained_response_has_the_fate_of_every_token(server: Server) -> None:
    content = text_of(CHUNKS[1:4], "Explained?")
    answer = server.post(asked(server, content, kv_transfer_params=settings(explain=True)))[1]
    found, told = explanation_of(answer), answer["kv_transfer_params"]["cachetune"]
    assert sum(part.tokens for part in found.parts) == answer["usage"]["prompt_tokens"]
    assert found.count("reused") == told["reused"] > 0
    assert found.count("recomputed") + found.count("skipped") == told["recomputed"]
    assert [chunk.outcome for chunk in found.chunks] == ["stored"] * 3
    assert content in "".join(run.text or "" for part in found.parts for run in part.runs)
    assert "Explained?" in html_page(found)


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


def test_whoever_asks_can_ask_again_where_the_model_is_not_sure(server: Server) -> None:
    """By the recipe in docs/vllm.md."""
    openai = pytest.importorskip("openai")
    page = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text()
    recipe = next(block for block in page.split("```python\n")[1:] if block.startswith("# ask_again.py")).split("```")[
        0
    ]
    names: dict[str, Any] = {}
    exec(recipe, names)
    names["client"] = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-")
    body = asked(server, text_of([CHUNKS[4], CHUNKS[2], CHUNKS[0]], "Sure?"))
    body.pop("ignore_eos")
    more = {"ignore_eos": True, "kv_transfer_params": settings(ratio=0.1)}
    sure, unsure = (names["ask"](bound, **body, extra_body=more) for bound in (0.0, 1.0))
    own = server.post(body | {"ignore_eos": True, "kv_transfer_params": settings(reuse=False)})[1]["choices"][0][
        "message"
    ]["content"]
    assert sure.model_dump()["kv_transfer_params"]["cachetune"]["reused"] > 0
    assert unsure.model_dump()["kv_transfer_params"]["cachetune"]["left"] == "asked"
    assert unsure.choices[0].message.content == own
    # Where tokens are drawn, what counts is the likeliest one, and not the one that was drawn.
    drawing = body | {"temperature": 2.0, "seed": 3}
    said = names["client"].chat.completions.create(**drawing, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    likeliest = min(max(each.logprob for each in token.top_logprobs) for token in said)
    drawn = min(token.logprob for token in said)
    assert drawn < likeliest - 0.1
    kept = names["ask"](math.exp(likeliest - 0.05), **drawing)
    assert (kept.model_dump().get("kv_transfer_params") or {}).get("cachetune", {}).get("left") != "asked"


def test_many_threads(server: Server) -> None:
    bodies = [asked(server, text_of([CHUNKS[(n + k) % 6] for k in (0, 2, 3)], f"Number {n}?")) for n in range(12)]
    one_by_one = [server.post(body)[1]["choices"][0]["message"]["content"] for body in bodies]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        together = [answer["choices"][0]["message"]["content"] for _, answer in pool.map(server.post, bodies)]
    assert together == one_by_one


def test_llama_index_and_langchain_reuse_by_their_stock_classes(server: Server) -> None:
    """In several threads, streaming and not."""
    like = pytest.importorskip("llama_index.llms.openai_like")
    langchain = pytest.importorskip("langchain_openai")
    place = {"api_key": "-", "model": str(server.model), "temperature": 0, "max_tokens": 4}
    llama = like.OpenAILike(api_base=f"{server.url}/v1", is_chat_model=True, **place)
    chat = langchain.ChatOpenAI(base_url=f"{server.url}/v1", **place)
    asks: list[Callable[[str], str]] = [
        lambda text: str(llama.complete(text).text),
        lambda text: "".join(piece.delta or "" for piece in llama.stream_complete(text)),
        lambda text: str(chat.invoke(text).content),
        lambda text: "".join(str(piece.content) for piece in chat.stream(text)),
    ]
    texts = [text_of(CHUNKS[2:5], f"For framework {number}?") for number in range(3)]
    before = server.metric("cachetune_vllm_requests_total")
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda case: case[0](case[1]), [(ask, text) for text in texts for ask in asks]))
    for number in range(len(texts)):
        assert len({*found[number * len(asks) : (number + 1) * len(asks)]}) == 1
    assert server.metric("cachetune_vllm_requests_total") >= before + len(texts)


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
    server.forget()
    server.post(asked(server, text_of(CHUNKS[3:], "Left?"), kv_transfer_params=settings(reuse=False)))
    told = server.post(asked(server, text_of(CHUNKS[:3], "Counted?")))[1]["kv_transfer_params"]["cachetune"]
    assert server.metric("cachetune_vllm_requests_left_total", 'reason="asked"') == left + 1
    assert server.metric("cachetune_vllm_chunk_tokens_total", 'kind="reused"') == reused + told["reused"]


def test_beams_are_left_to_vllm_and_counted(server: Server) -> None:
    before = server.metric("cachetune_vllm_requests_left_total", 'reason="beam search"')
    body = asked(server, text_of(CHUNKS[:2], "In beams?"), use_beam_search=True, n=2, max_tokens=3)
    status, answer = server.post(body)
    assert (status, len(answer["choices"])) == (200, 2)
    assert server.metric("cachetune_vllm_requests_left_total", 'reason="beam search"') == before + 1 + 2 * 2


def test_clients_that_go_away_leave_nothing_behind(server: Server) -> None:
    rng = random.Random(0)
    right = asked(server, text_of(CHUNKS[:3], "Still right?"))
    before = server.post(right)[1]["choices"][0]["message"]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        for number in range(36):
            body = asked(server, text_of(rng.sample(CHUNKS, 3), f"Gone {number}?"), stream=True, max_tokens=400)
            pool.submit(go_away, server, json.dumps(body).encode(), rng.choice([0, 0, 1, 400, 2000]))
    until = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting"):
        assert time.monotonic() < until, "requests of clients that are gone go on"
        time.sleep(0.2)
    assert server.post(right)[1]["choices"][0]["message"] == before
    new = server.post(asked(server, text_of(CHUNKS[1:4], "And a new one?")))[1]
    assert new["kv_transfer_params"]["cachetune"]["reused"] > 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def go_away(server: Server, body: bytes, count: int) -> None:
    """Ask, read so many bytes of the answer, and close the connection."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 60) as client:
        client.sendall(head.encode() + body)
        while count > 0 and (piece := client.recv(count)):
            count -= len(piece)


def test_two_servers_use_one_encrypted_store(
    server: Server, tiny_vllm: Callable[..., TinyVLLM], tmp_path: Path
) -> None:
    """One stores what was missed while the other reads, and documents come and go meanwhile. Answers are those from a plain store."""
    opened = transfer(server.store, **sealed(server))
    beside = Served(tiny_vllm("llama", packed=False, kv_transfer_config=opened), server.store)
    notes = [f"Note {number}, which nobody has precomputed before a server is asked for it." for number in range(4)]
    bodies = [
        asked(server, text_of([*CHUNKS[3:], note]), kv_transfer_params=settings(chunks=[*CHUNKS[3:], note]))
        for note in notes
    ]
    prompts, asks = [shuffled(seed) for seed in range(200, 206)], {"selector": "frequency", "ratio": 0.15}
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        others = pool.submit(come_and_go, server)
        answers = [pool.submit(server.post, body) for body in bodies]
        found = beside.tokens(prompts, **asks)
        told = [answer.result()[1]["kv_transfer_params"]["cachetune"] for answer in answers]
        for (
            each
        ) in told:  # One left to vLLM may be over before the worker says what it will store; it says what was missed.
            assert each["storing"] == 1 if "storing" in each else each["left"] and each["missed"], told
        others.result()
    assert found == Served(beside.tiny, filled_store(tmp_path)[1]).engines(prompts, **asks)
    chunks, until, number = [CHUNKS[0], *notes], time.monotonic() + 60, 0
    while True:  # until one server has stored all notes, and the other has heard of them
        said = report(beside.ask([prompt_of(chunks, f"Try {number}?")], **asks)[0])
        if said["reused"] + said.get("recomputed", 0) == sum(len(encode(text)) for text in chunks):
            break
        assert time.monotonic() < until, said
        number += 1
        time.sleep(0.2)
    beside.assert_nothing_left_behind()
    written = b"".join(file.read_bytes() for file in server.store.rglob("*") if file.is_file())
    assert not [text for text in chunks if text.encode() in written]


def come_and_go(server: Server) -> None:
    """Add documents to the server's store, and remove them."""
    with CacheTune(loaded(server), tiny.tokenizer(), server.store, **sealed(server)) as engine:
        for number in range(4):
            engine.precompute(
                Document(f"page {number}", [f"Page {number}, which is there for a moment and then is gone."])
            )
            engine.remove(f"page {number}")


def loaded(server: Server) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(server.model, dtype=torch.float32).eval()


def test_documents_are_added_while_the_server_runs(server: Server) -> None:
    text = "A page that was written after the server had started, and that a nightly job has just precomputed for everybody."
    with CacheTune(loaded(server), tiny.tokenizer(), server.store, **sealed(server)) as engine:
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


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of several processes: each costs the seconds in which it imports vLLM."""
    folder = tmp_path_factory.mktemp("several")
    model, store = filled_store(folder)
    with Server(model, store, folder / "log", ["--data-parallel-size", "2", "--api-server-count", "2"]) as server:
        yield server


@pytest.mark.every_family
def test_each_of_several_api_servers_reports_refuses_and_counts(several: Server) -> None:
    connections = several.connections()
    assert len(connections) == 2
    for number, connection in enumerate(connections):
        before = counted(connection)
        content = text_of(CHUNKS[1:4], f"From which one, {number}?")
        status, answer = over(connection, asked(several, content, kv_transfer_params=settings()))
        assert status == 200
        assert answer["kv_transfer_params"]["cachetune"]["reused"] > 0
        status, answer = over(connection, asked(several, content, kv_transfer_params=settings(ratio=9)))
        assert (status, "ratio is 9" in answer["error"]["message"]) == (400, True)
        # Whichever is asked tells what all of them have counted.
        assert [counted(each) for each in connections] == [before + 1] * 2
    for connection in connections:
        connection.close()


def over(connection: HTTPConnection, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Ask by this connection, and so the API server at its other end."""
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.load(answer)


def counted(connection: HTTPConnection) -> float:
    """Requests that have reused chunks, as the API server at the other end tells it."""
    connection.request("GET", "/metrics")
    return value_of(connection.getresponse().read().decode(), "cachetune_vllm_requests_total")


@pytest.mark.every_family
def test_data_parallel_engines_reuse_chunks_of_one_store(several: Server) -> None:
    before = [of_engine(several, engine) for engine in (0, 1)]
    texts = [text_of(random.Random(seed).sample(CHUNKS, 3), f"Number {seed}?") for seed in range(12)]
    one_by_one = [several.post(asked(several, text, kv_transfer_params=settings()))[1] for text in texts]
    several.forget()
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        bodies = [asked(several, f"Once more. {text}", kv_transfer_params=settings()) for text in texts]
        together = [answer for _, answer in pool.map(several.post, bodies)]
    for answer in (*one_by_one, *together):
        assert answer["kv_transfer_params"]["cachetune"]["reused"] > 0
    counts = [of_engine(several, engine) - earlier for engine, earlier in enumerate(before)]
    assert min(counts) > 0
    assert sum(counts) == len(one_by_one) + len(together)


def of_engine(server: Server, engine: int) -> float:
    """Requests that have reused chunks in one of its engines."""
    return server.metric("cachetune_vllm_requests_total", f'engine="{engine}"')
