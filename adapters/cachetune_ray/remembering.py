"""A replica's side of what is remembered of memories: it tells what it has, and begins with what another had."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import aiohttp
import ray.exceptions

from cachetune_ray.server_client import ServerClient

TELL_SECONDS = 2.0
_LOOK_SECONDS = 0.1
_log = logging.getLogger("ray.serve")


class Remembering:
    """Never waits longer than it is told, and never fails: without `Memories`, a replica works, and begins with nothing in memory.

    Args:
        memories: the deployment of `Memories`.
        server: this replica's.
        name: this replica's.
    """

    def __init__(self, memories: Any, server: ServerClient, name: str):
        self._memories, self._server, self._name = memories, server, name
        self.warmed = 0
        """Chunks that were read into memory before the first request, or are being read behind the first ones."""

    async def tell(self, *, changed: bool) -> None:
        """Tell what is in memory, for replicas that begin later.

        Args:
            changed: whether that is something else than before.
        """
        try:
            async with asyncio.timeout(TELL_SECONDS):
                known = await self._memories.tell.remote(self._name, await self._server.keys() if changed else None)
                if not known:
                    await self._memories.tell.remote(self._name, await self._server.keys())
        except (aiohttp.ClientError, ray.exceptions.RayError, TimeoutError) as error:
            _log.warning("what is in memory could not be told: %r", error)

    async def warm(self, seconds: float) -> None:
        """Have chunks read into memory that a lost replica had, or that the others use; wait for that so long at most."""
        try:
            async with asyncio.timeout(seconds):
                keys = await self._memories.wanted.remote(self._name)
                if not keys:
                    return
                await self._server.warm(keys)
                running = True
                while running:
                    await asyncio.sleep(_LOOK_SECONDS)
                    running, self.warmed = await self._server.warming()
        except (aiohttp.ClientError, ray.exceptions.RayError) as error:
            _log.warning("memory could not be filled before the first request: %r", error)
        except TimeoutError:
            _log.warning("memory was not filled in %s s: what was begun goes on behind requests", seconds)
        else:
            _log.info("%s chunks were read into memory before the first request", self.warmed)
