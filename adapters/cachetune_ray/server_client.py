"""What a replica asks the vLLM server beside it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
from yarl import URL

from cachetune_ray.question import Question
from cachetune_ray.server_process import ServerGoneError
from cachetune_vllm import sketches

OF_ONE_HOP = {"host", "connection", "content-length", "transfer-encoding", "keep-alive", "upgrade", "te", "trailer"}
"""Headers that a hop of a request has of its own."""


class ServerClient:
    """Asks one server. All methods but `ask` raise `aiohttp.ClientError` where it doesn't answer.

    Args:
        url: the server's scheme, host and port.
    """

    def __init__(self, url: str):
        self._url = url
        # No limit on time: an answer takes as long as it takes, and who asked may hang up.
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))

    async def close(self) -> None:
        """Close its connections."""
        await self._session.close()

    async def ask(self, question: Question) -> AsyncIterator[Any]:
        """The server's answer to a client: status and headers, then the body piece by piece.

        Raises:
            ServerGoneError: the server has ended, or closed the connection.
        """
        try:
            async with self._session.request(
                question.method,
                self._at(question.path),
                headers=question.headers,
                data=question.body,
                allow_redirects=False,
            ) as response:
                yield response.status, [pair for pair in response.headers.items() if pair[0].lower() not in OF_ONE_HOP]
                async for piece in response.content.iter_any():
                    yield piece
        except aiohttp.ClientError as error:
            raise ServerGoneError(f"the vLLM server of this replica doesn't answer: {error}") from error

    async def healthy(self) -> bool:
        """Whether it answers that it is; never an error."""
        try:
            async with self._session.get(self._at("/health")) as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False

    async def sketch(self) -> bytes:
        """A sketch of the chunks in its memory; empty where it has none."""
        async with self._session.get(self._at(sketches.PATH)) as response:
            return await response.read() if response.status == 200 else b""

    async def keys(self) -> list[str]:
        """Keys of the chunks in its memory, the one used last first."""
        async with self._session.get(self._at(sketches.MEMORY)) as response:
            return (await response.text()).split()

    async def warm(self, keys: Sequence[str]) -> None:
        """Have chunks read into its memory."""
        async with self._session.post(
            self._at(sketches.MEMORY), data="\n".join(keys[: sketches.MOST_KEYS])
        ) as response:
            response.raise_for_status()

    async def warming(self) -> tuple[bool, int]:
        """Whether they are still being read, and how many were."""
        async with self._session.get(self._at(sketches.WARMING)) as response:
            found = await response.json(content_type=None)
        return bool(found["running"]), int(found["chunks"])

    async def metrics(self, seconds: float) -> str:
        """What it tells Prometheus.

        Raises:
            TimeoutError: it took longer than so many seconds.
        """
        async with self._session.get(self._at("/metrics"), timeout=aiohttp.ClientTimeout(seconds)) as response:
            return await response.text() if response.status == 200 else ""

    def _at(self, path: str) -> URL:
        """The path at this server, as it is: joined to a base and tidied up, it could become another path, or another server."""
        return URL(f"{self._url}{path}", encoded=True)
