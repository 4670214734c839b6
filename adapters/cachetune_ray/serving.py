"""A Ray Serve application: vLLM servers that reuse chunks, and a router that sends a request where most of its chunks are in host memory.

    serve run cachetune_ray.serving:build model=org/name store=/data/kv replicas=4 gpus=1

docs/scale.md says how it behaves. Clients see vLLM's OpenAI API.
"""

from __future__ import annotations

import asyncio
import logging
import os
import urllib.parse
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import aiohttp
import fastapi
import ray.exceptions
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.config import RequestRouterConfig

from cachetune_rag.checking.arguments import check_count, is_number
from cachetune_rag.errors import ConfigError
from cachetune_ray import metrics
from cachetune_ray.memories import Memories
from cachetune_ray.question import Question
from cachetune_ray.remembering import Remembering
from cachetune_ray.router import STATS, ChunkRouter
from cachetune_ray.routing import SETTLE_SECONDS, SPREAD
from cachetune_ray.server_client import OF_ONE_HOP, ServerClient
from cachetune_ray.server_process import ServerGoneError, ServerProcess
from cachetune_store.printing import shown
from cachetune_vllm import sketches
from cachetune_vllm.serve import command_line

TRIES = 3
"""How often a request is given to a replica, if one dies with it."""
ANSWERED_BY = "x-cachetune-replica"
"""The header of an answer that names the replica it comes from."""
WARM_SECONDS = 30.0
_SKETCH_SECONDS = 2.0
_SILENT_SKETCHES = 5
"""Sketches that a replica doesn't publish before it counts as lost."""
_WATCH_SECONDS = 0.1
_METRICS_SECONDS = 8.0  # Prometheus waits for ten
_CHUNK_ROUTER = f"{ChunkRouter.__module__}.{ChunkRouter.__qualname__}"
_TRY_AGAIN_SECONDS = 0.3  # in which routers learn of the death
_GONE = (ray.exceptions.RayActorError, ServerGoneError)
_log = logging.getLogger("ray.serve")


class Replica:
    """An actor with a vLLM server beside it. It hands requests on and publishes which chunks the server has in memory.

    Args:
        words: a line of `vllm serve`.
        memories: the deployment of `Memories`; None: what is in memory is told to nobody, and nothing is read into it at the start.
        warm_seconds: how long it waits, at most, for chunks that are read into memory before it takes requests. Reading goes on behind them.
    """

    async def __init__(self, words: Sequence[str], memories: Any = None, warm_seconds: float = WARM_SECONDS):  # type: ignore[misc]  # Ray Serve awaits it
        self._process = ServerProcess(words)
        self._server = ServerClient(self._process.url)
        self._sketch, self._version = b"", 0
        while not await self._server.healthy():
            self._process.check()
            await asyncio.sleep(0.2)
        self._remembering = None if memories is None else Remembering(memories, self._server, self._name)
        if self._remembering is not None:
            await self._remembering.warm(warm_seconds)
        self._watch = asyncio.create_task(self._end_with_server())

    async def ask(self, question: Question) -> AsyncIterator[Any]:
        """The server's answer: status and headers, then the body piece by piece.

        Raises:
            ServerGoneError: the server has ended, or closed the connection.
        """
        pieces = self._server.ask(question)
        status, headers = await anext(pieces)
        yield status, [*headers, (ANSWERED_BY, self._name)]
        async for piece in pieces:
            yield piece

    async def check_health(self) -> None:
        """Ray Serve asks this, and starts another replica where it raises an error."""
        self._process.check()
        if not await self._server.healthy():
            raise ServerGoneError(f"the vLLM server of this replica, process {self._process.pid}, is not healthy.")

    async def record_routing_stats(self) -> dict[str, Any]:
        """Ray Serve asks this every few seconds, and hands it to the routers."""
        try:
            sketch = await self._server.sketch()
        except aiohttp.ClientError as error:
            _log.warning("no sketch of the chunks in memory: %s", error)
            sketch = b""
        changed = bool(sketch) and sketch != self._sketch
        if changed:
            self._sketch, self._version = sketch, self._version + 1
        if self._remembering is not None:
            await self._remembering.tell(changed=changed)
        return {STATS: (self._version, self._sketch)} if self._sketch else {}

    async def metrics(self) -> tuple[str, str]:
        """This replica, and what its server tells Prometheus; nothing if it doesn't answer just now."""
        try:
            return self._name, await self._server.metrics(_METRICS_SECONDS / 2)
        except (aiohttp.ClientError, TimeoutError) as error:
            _log.warning("no metrics of the vLLM server: %r", error)
            return self._name, ""

    async def warmed(self) -> tuple[str, int]:
        """This replica, and how many chunks were read into its memory before its first request, for tests and operators."""
        return self._name, 0 if self._remembering is None else self._remembering.warmed

    @property
    def _name(self) -> str:
        return str(serve.get_replica_context().replica_id.unique_id)

    async def server_pid(self) -> int:
        """The server's process, for tests and operators."""
        return self._process.pid

    def __del__(self) -> None:
        """Ray Serve calls this when the replica is to go."""
        if hasattr(self, "_watch"):
            self._watch.cancel()  # the server is to end now
        if hasattr(self, "_process"):
            self._process.stop()

    async def _end_with_server(self) -> None:
        """End this actor where its server ends: at once no router sends it anything, and Ray Serve starts another."""
        while self._process.running:
            await asyncio.sleep(_WATCH_SECONDS)
        _log.error("the vLLM server of this replica has ended, and the replica ends with it")
        # Where a server is killed, its engine's process goes on, and keeps the GPU's memory that the next replica's server needs.
        self._process.stop()
        os._exit(1)


_api = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


class Ingress:
    """Reads requests and asks a replica that the router chooses. If a replica dies before anything of its answer was sent on, another is asked.

    Args:
        replicas: the deployment of `Replica`.
    """

    def __init__(self, replicas: Any):
        self._every, self._replicas = replicas, replicas.options(stream=True)

    @_api.api_route("/{path:path}", methods=["GET", "POST"])  # type: ignore[untyped-decorator]
    async def answer(self, path: str, request: fastapi.Request) -> Response:
        """Hand a request on. `path` is in the request as well."""
        segments = path.split("/")
        # No path of vLLM's has such segments, and what stands between may take one path for another because of them.
        if "" in segments[:-1] or not {".", ".."}.isdisjoint(segments):
            return Response(status_code=404)
        # Whoever has a text could ask whether others' requests show it.
        if f"/{path}".startswith(sketches.BELOW):
            return Response(status_code=404)
        if (request.method, path) == ("GET", "metrics"):
            return await self._metrics()
        query = f"?{request.url.query}" if request.url.query else ""
        headers = [pair for pair in request.headers.items() if pair[0].lower() not in OF_ONE_HOP]
        body = await request.body()
        # Hashing a long prompt takes milliseconds, in which other requests go on.
        target = f"/{urllib.parse.quote(path)}{query}"
        question = await asyncio.to_thread(Question.of, request.method, target, headers, body)
        for left in range(TRIES - 1, -1, -1):
            try:
                return await self._ask(question)
            except _GONE as error:
                _log.warning("a replica has died with a request (%s more tries): %s", left, error)
                if not left:
                    message = f"{TRIES} replicas, one after the other, died with this request: {error}"
                    return JSONResponse({"error": {"message": message, "type": "server_error"}}, 503)
                await asyncio.sleep(_TRY_AGAIN_SECONDS)
        raise AssertionError("every try returns or raises")

    async def _metrics(self) -> Response:
        """Those of all replicas. One that has just died, or doesn't answer, is left out, and Prometheus sees that its samples end."""
        answers = await self._every.broadcast("metrics").results_async(
            timeout_s=_METRICS_SECONDS, return_exceptions=True
        )
        for error in (each for each in answers if isinstance(each, Exception)):
            _log.warning("no metrics of a replica: %s", error)
        told = dict(each for each in answers if not isinstance(each, Exception))
        return Response(await asyncio.to_thread(metrics.merged, told), media_type=metrics.CONTENT_TYPE_LATEST)

    async def _ask(self, question: Question) -> Response:
        pieces = self._replicas.ask.remote(question)
        status, headers = await anext(pieces)
        if question.streamed:
            # What was sent on can't be taken back: from the first piece on, the answer is this replica's.
            first = await anext(pieces, b"")
            response: Response = StreamingResponse(_chained(first, pieces), status)
        else:
            response = Response(b"".join([piece async for piece in pieces]), status)
        for name, value in headers:
            response.headers[name] = value
        return response


async def _chained(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


def application(
    model: str,
    settings: Mapping[str, Any],
    options: Sequence[str] = (),
    *,
    replicas: int = 1,
    gpus: float = 0,
    cpus: float = 1,
    most_at_once: int = 64,
    spread: float = SPREAD,
    settle: float = SETTLE_SECONDS,
    sketch_seconds: float = _SKETCH_SECONDS,
    warm_seconds: float = WARM_SECONDS,
    router: Any = ChunkRouter,
) -> Any:
    """The application, for `ray.serve.run`.

    Args:
        model: folder of the model on all machines, or its hub id.
        settings: of the connector (`cachetune_vllm.settings.ServerSettings`): store, host_budget, ratio, ...
        options: of `vllm serve`.
        replicas: how many servers.
        gpus, cpus: what each takes of its machine.
        most_at_once: requests that a replica is given at the same time; more wait.
        spread, settle: of `ChunkRouting`.
        sketch_seconds: how often replicas publish which chunks they have in memory.
        warm_seconds: how long a new replica waits, at most, until chunks that a lost one had, or that the others use, are in its memory. 0: it reads none.
        router: another `RequestRouter` of Ray Serve, to compare with.

    Raises:
        ConfigError: an argument can't be used.
    """
    for name, value in (("replicas", replicas), ("most_at_once", most_at_once)):
        check_count(value, name, "a whole number, 1 or more")
    if not is_number(warm_seconds) or warm_seconds < 0:
        raise ConfigError(f"warm_seconds is {shown(warm_seconds)}: use seconds, 0 or more (default: {WARM_SECONDS}).")
    own = {"spread": spread, "settle": settle} if router in (ChunkRouter, _CHUNK_ROUTER) else {}
    words = command_line(
        model,
        dict(settings),
        [
            *options,
            *("--worker-extension-cls", f"{sketches.__name__}.{sketches.SketchingWorker.__name__}"),
            *("--middleware", f"{sketches.__name__}.{sketches.SketchEndpoint.__name__}"),
        ],
    )
    servers = serve.deployment(Replica).options(
        num_replicas=replicas,
        max_ongoing_requests=most_at_once,
        ray_actor_options={"num_gpus": gpus, "num_cpus": cpus},
        health_check_period_s=5,
        request_router_config=RequestRouterConfig(
            request_router_class=router,
            request_router_kwargs=own,
            request_routing_stats_period_s=sketch_seconds,
        ),
    )
    ingress = serve.deployment(serve.ingress(_api)(Ingress)).options(max_ongoing_requests=most_at_once * replicas)
    # It answers in no time and computes nothing, so it takes no processor of its own.
    remembering = serve.deployment(Memories).options(ray_actor_options={"num_cpus": 0})
    memories = remembering.bind(_SILENT_SKETCHES * sketch_seconds) if warm_seconds else None
    return ingress.bind(servers.bind(words, memories, warm_seconds))


def build(arguments: dict[str, str]) -> Any:
    """The application from words such as `model=M store=S replicas=4`, for `serve run` and Serve's configuration files.

    Args:
        arguments: `model`, `store`, those of `application`, and settings of the connector; `options` are words of `vllm serve`.
    """
    given = dict(arguments)
    for name in ("model", "store"):
        if not given.get(name):
            raise ConfigError(
                f"{name} is {shown(given.get(name))}: say {name}=..., as in `model=org/name store=/data/kv`."
            )
    numbers = {"replicas": int, "gpus": float, "cpus": float, "most_at_once": int, "spread": float, "settle": float}
    numbers |= {"sketch_seconds": float, "warm_seconds": float}
    own = {name: kind(given.pop(name)) for name, kind in numbers.items() if name in given}
    options = str(given.pop("options", "")).split()
    return application(given.pop("model"), given, options, **own)
