"""The Serve application's own parts: what a router makes of a request, and what an ingress does where a replica dies. No cluster is started."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("ray")
pytest.importorskip("fastapi")

import ray.exceptions
from aiohttp import web
from aiohttp.test_utils import RawTestServer

from cachetune_rag.errors import ConfigError
from cachetune_ray import remembering, server_process, serving
from cachetune_ray.memories import Memories
from cachetune_ray.question import Question
from cachetune_ray.router import STATS, ChunkRouter
from cachetune_ray.server_client import ServerClient
from cachetune_ray.serving import TRIES, Ingress, application, build
from cachetune_ray.sketch import Sketch, samples_of
from cachetune_vllm.sketches import SketchEndpoint

PASSAGE = "A passage that is long enough to have some hashes of its own. " * 12


def question(body: Any, path: str = "/v1/chat/completions") -> Question:
    return Question.of("POST", path, [], body if isinstance(body, bytes) else json.dumps(body).encode())


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "system", "content": "Short."}, {"role": "user", "content": PASSAGE}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": PASSAGE}]}]},
        {"prompt": PASSAGE},
        {"prompt": [PASSAGE, "Another."]},
    ],
)
def test_hashes_of_a_request_are_those_of_its_texts(body: dict[str, Any]) -> None:
    assert set(samples_of([PASSAGE]).tolist()) <= set(question(body).samples.tolist())
    assert not question(body).streamed
    assert question(body | {"stream": True}).streamed


@pytest.mark.parametrize("body", [b"", b"no JSON", {"prompt": [1, 2, 3]}, [PASSAGE], {"messages": 7}])
def test_what_shows_no_text_has_no_hashes(body: Any) -> None:
    assert question(body).samples.size == 0


class Named:
    def __init__(self, name: str):
        self.name = name

    def to_full_id_str(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Named) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


class Other:
    """A replica as Ray Serve shows it to a router."""

    def __init__(self, name: str, *texts: str):
        self.replica_id = Named(name)
        self.routing_stats = {STATS: (1, Sketch.of(samples_of(texts)).to_bytes())} if texts else {}


class Pending:
    def __init__(self, asked: Question):
        self.args = [asked]


class Router(ChunkRouter):
    """Without Ray's own state."""

    def __init__(self) -> None:
        self.initialize_state()

    @property
    def replica_queue_len_cache(self) -> dict[Any, int]:
        return {}


async def test_a_router_asks_the_replica_that_has_the_chunks_unless_it_has_too_much_to_do() -> None:
    router = Router()
    replicas = [Other("a"), Other("b", PASSAGE), Other("c", "x" * 400)]
    asked = Pending(question({"prompt": PASSAGE}))
    ranks = await router.choose_replicas(replicas, asked)
    assert [each.replica_id.name for each in ranks[0]] == ["b"]
    assert len(ranks) == 3
    for _ in range(2):
        router.on_request_routed(asked, Named("b"), None)
    assert (await router.choose_replicas(replicas, asked))[0][0].replica_id.name != "b"
    for _ in range(3):
        router.on_request_completed(Named("b"), "id")
    assert (await router.choose_replicas(replicas, asked))[0][0].replica_id.name == "b"


class Replicas:
    """A handle of which the first calls fail, before their answers or in the midst."""

    def __init__(self, failures: int, *, after: int):
        self.failures, self.after, self.calls = failures, after, 0
        self.ask = self

    def options(self, **_: Any) -> Replicas:
        return self

    async def remote(self, question: Question) -> AsyncIterator[Any]:
        self.calls += 1
        dies = self.calls <= self.failures
        for number, piece in enumerate([(200, [("content-type", "text/plain")]), b"one ", b"two"]):
            if dies and number == self.after:
                raise ray.exceptions.RayActorError
            yield piece


class Asked:
    """A client's request as FastAPI gives it."""

    def __init__(self, *, stream: bool = False):
        self._body = json.dumps({"prompt": PASSAGE, "stream": stream}).encode()
        self.method, self.headers, self.url = "POST", {"host": "h", "accept": "x"}, type("Url", (), {"query": ""})

    async def body(self) -> bytes:
        return self._body


def ingress(replicas: Replicas) -> Any:
    return Ingress(replicas)


@pytest.mark.parametrize("after", [0, 1, 2])
async def test_a_request_is_asked_again_where_a_replica_dies_with_it(after: int) -> None:
    replicas = Replicas(1, after=after)
    response = await ingress(replicas).answer("v1/completions", Asked())
    assert (response.status_code, response.body, replicas.calls) == (200, b"one two", 2)
    assert response.headers["content-type"] == "text/plain"


async def test_a_streamed_answer_is_asked_again_until_something_of_it_was_sent_on() -> None:
    replicas = Replicas(1, after=1)
    response = await ingress(replicas).answer("v1/completions", Asked(stream=True))
    assert b"".join([piece async for piece in response.body_iterator]) == b"one two"
    broken = await ingress(Replicas(1, after=2)).answer("v1/completions", Asked(stream=True))
    with pytest.raises(ray.exceptions.RayActorError):
        [piece async for piece in broken.body_iterator]


@pytest.mark.parametrize("path", ["cachetune/sketch", "cachetune/memory", "cachetune/warming"])
async def test_clients_see_nothing_of_memory(path: str) -> None:
    replicas = Replicas(0, after=0)
    response = await ingress(replicas).answer(path, Asked())
    assert (response.status_code, replicas.calls) == (404, 0)


EXPOSED = """# HELP vllm:requests_total Requests.
# TYPE vllm:requests_total counter
vllm:requests_total{model_name="m"} %s
# HELP vllm:seconds Seconds.
# TYPE vllm:seconds histogram
vllm:seconds_bucket{le="1.0"} 2.0
vllm:seconds_bucket{le="+Inf"} 2.0
vllm:seconds_count 2.0
vllm:seconds_sum 0.5
"""


class Told:
    """A handle whose broadcasts are answered by two replicas, of which one dies."""

    def options(self, **_: Any) -> Told:
        return self

    def broadcast(self, name: str) -> Told:
        assert name == "metrics"
        return self

    async def results_async(self, **_: Any) -> list[Any]:
        return [("a", EXPOSED % 3.0), ray.exceptions.RayActorError(), ("b", EXPOSED % 4.0)]


async def test_metrics_are_those_of_all_replicas() -> None:
    asked = Asked()
    asked.method = "GET"
    response = await ingress(Told()).answer("metrics", asked)
    lines = response.body.decode().splitlines()
    assert response.headers["content-type"].startswith("text/plain")
    assert 'vllm:requests_total{model_name="m",replica="a"} 3.0' in lines
    assert 'vllm:requests_total{model_name="m",replica="b"} 4.0' in lines
    assert 'vllm:seconds_bucket{le="+Inf",replica="b"} 2.0' in lines
    assert lines.count("# TYPE vllm:requests_total counter") == lines.count("# TYPE vllm:seconds histogram") == 1


@pytest.mark.parametrize(
    "path",
    [
        "./cachetune/sketch",
        "v1/../cachetune/memory",
        "/cachetune/sketch",
        "/127.0.0.1:8265/api/jobs/",
        "v1//models",
        "..",
        ".",
    ],
)
async def test_a_path_that_could_be_taken_for_another_is_refused(path: str) -> None:
    replicas = Replicas(0, after=0)
    response = await ingress(replicas).answer(path, Asked())
    assert (response.status_code, replicas.calls) == (404, 0)


async def test_a_replica_asks_its_own_server_whatever_the_path_is() -> None:
    asked: list[tuple[str, str]] = []

    async def answer(request: web.BaseRequest) -> web.Response:
        asked.append((request.raw_path, request.headers["host"]))
        return web.Response(text="here")

    async with RawTestServer(answer) as server:
        here = f"{server.host}:{server.port}"
        client = ServerClient(f"http://{here}")
        paths = ["//127.0.0.1:1/secret", "/./cachetune/sketch", "/v1/%2e%2e/x%2Fy?a=%41", "/http://127.0.0.1:1/"]
        for path in paths:
            pieces = [piece async for piece in client.ask(Question.of("GET", path, [], b""))]
            assert pieces[1:] == [b"here"]
        await client.close()
    assert asked == [(path, here) for path in paths]


class Never:
    """A handle whose deployment has no replica: nothing ever comes."""

    @property
    def tell(self) -> Never:
        return self

    wanted = tell

    async def remote(self, *_: Any) -> None:
        await asyncio.Event().wait()


async def test_nobody_waits_for_what_is_remembered_when_it_is_not_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remembering, "TELL_SECONDS", 0.01)
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    server: Any = None  # which is not asked
    mine = remembering.Remembering(Never(), server, "r")
    await asyncio.wait_for(mine.warm(0.01), 5)
    await asyncio.wait_for(mine.tell(changed=False), 5)
    assert "memory was not filled in 0.01 s" in caplog.text
    assert "what is in memory could not be told: TimeoutError()" in caplog.text


class Beside:
    """The server of a replica, which reads a chunk each time that it is asked."""

    def __init__(self) -> None:
        self.wanted: list[str] = []
        self.read = 0

    async def keys(self) -> list[str]:
        return ["c"]

    async def warm(self, keys: list[str]) -> None:
        self.wanted = keys

    async def warming(self) -> tuple[bool, int]:
        self.read += 1
        return self.read < len(self.wanted), self.read


class Called:
    """A handle to `Memories`, in this process."""

    def __init__(self, of: Memories, name: str = ""):
        self._of, self._method = of, name

    def __getattr__(self, name: str) -> Called:
        return Called(self._of, name)

    async def remote(self, *given: Any) -> Any:
        return getattr(self._of, self._method)(*given)


async def test_a_new_replica_waits_until_its_memory_has_what_the_others_use() -> None:
    memories, beside = Memories(10), Beside()
    memories.tell("other", ["a", "b"])
    server: Any = beside
    mine = remembering.Remembering(Called(memories), server, "new")
    await mine.warm(5)
    assert (beside.wanted, mine.warmed) == (["a", "b"], 2)
    await mine.tell(changed=False)
    assert memories.wanted("newer") == ["a", "c", "b"], (
        "it has told what it has, although nothing changed: nobody knew it"
    )


class Client:
    """vLLM's client of its workers, with one worker."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    async def collective_rpc(self, name: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if name == "cachetune_warm":
            self.asked.append(args[0])
            return [None]
        return [{"cachetune_memory": ["a" * 64, "b" * 64], "cachetune_warming": (True, 3, 70)}[name]]


async def told(client: Client, method: str, path: str, *body: bytes) -> tuple[int, bytes]:
    """Status and body of a server's answer."""
    sent: list[Any] = []
    pieces = [{"body": piece, "more_body": number < len(body) - 1} for number, piece in enumerate(body or (b"",))]

    async def receive() -> Any:
        return pieces.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    async def others(*_: Any) -> None:
        sent.extend([{"status": 0}, {"body": b"vLLM's own"}])

    state = type("State", (), {"engine_client": client})
    scope = {"type": "http", "method": method, "path": path, "app": type("App", (), {"state": state})}
    await SketchEndpoint(others)(scope, receive, send)
    return sent[0]["status"], sent[1]["body"]


async def test_a_server_tells_what_is_in_its_memory_and_takes_more_into_it() -> None:
    client = Client()
    assert await told(client, "GET", "/cachetune/memory") == (200, b"a" * 64 + b"\n" + b"b" * 64)
    assert await told(client, "POST", "/cachetune/memory", b"c" * 64 + b"\n" + b"d" * 10, b"d" * 54) == (202, b"")
    assert client.asked == [["c" * 64, "d" * 64]]
    status, said = await told(client, "GET", "/cachetune/warming")
    assert (status, json.loads(said)) == (200, {"running": True, "chunks": 3, "bytes": 70})
    status, said = await told(client, "POST", "/cachetune/memory", b"../etc")
    assert (status, b"'../etc' is no key of a chunk" in said) == (400, True)
    assert (await told(client, "POST", "/cachetune/memory", b"a" * 400_000))[0] == 413
    assert len(client.asked) == 1
    assert (await told(client, "GET", "/v1/models"))[1] == b"vLLM's own"


async def test_a_request_that_no_replica_survives_says_so() -> None:
    replicas = Replicas(99, after=0)
    response = await ingress(replicas).answer("v1/completions", Asked())
    assert (response.status_code, replicas.calls) == (503, TRIES)
    assert f"{TRIES} replicas, one after the other, died with this request" in response.body.decode()


def test_an_application_is_built_from_words() -> None:
    assert build({"model": "m", "store": "/kv", "replicas": "2", "host_budget": "1GiB", "options": "--seed 1"})
    with pytest.raises(ConfigError, match="store is None: say store="):
        build({"model": "m"})
    with pytest.raises(ConfigError, match="replicas is 0"):
        application("m", {"store": "/kv"}, replicas=0)
    with pytest.raises(ConfigError, match="warm_seconds is -1"):
        application("m", {"store": "/kv"}, warm_seconds=-1)
    with pytest.raises(ConfigError, match="host_bugdet"):
        application("m", {"store": "/kv", "host_bugdet": 1})


SERVER_WITH_AN_ENGINE = """
import pathlib, subprocess, sys, time
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
engine = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
engine.stdout.readline()
pathlib.Path(sys.argv[1]).write_text(str(engine.pid))
time.sleep(60)
"""


def test_the_engine_of_a_killed_server_ends_with_the_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "server_with_an_engine.py").write_text(SERVER_WITH_AN_ENGINE)
    told = tmp_path / "pid"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(server_process, "module_and_words", lambda _words: ["server_with_an_engine", str(told)])
    monkeypatch.setattr(os, "_exit", sys.exit)
    server = server_process.ServerProcess([])
    try:
        until = time.monotonic() + 60
        while not (told.exists() and told.read_text()):
            assert time.monotonic() < until
            time.sleep(0.05)
        engine = psutil.Process(int(told.read_text()))
        os.kill(server.pid, signal.SIGKILL)
        replica = object.__new__(serving.Replica)  # its own __init__ needs a cluster
        replica._process = server
        with pytest.raises(SystemExit):
            asyncio.run(replica._end_with_server())
        while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until, "the engine outlived its server and its replica"
            time.sleep(0.05)
    finally:
        server.stop()


@pytest.mark.parametrize("router", ["itself", "cachetune_ray.router.ChunkRouter"])
def test_the_routers_settings_reach_it_however_it_is_named(monkeypatch: pytest.MonkeyPatch, router: str) -> None:
    made, real = [], serving.RequestRouterConfig
    monkeypatch.setattr(serving, "RequestRouterConfig", lambda **given: made.append(given) or real(**given))
    named = {} if router == "itself" else {"router": router}
    serving.application("M", {"store": "kv"}, [], spread=1.5, settle=3.0, **named)
    assert made[0]["request_router_kwargs"] == {"spread": 1.5, "settle": 3.0}
