"""Places that many machines share, for tests: a folder, S3, Valkey, and Azure where its emulator is installed; each new for every test."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from remote_servers import (
    BUCKET,
    azure_options,
    azure_server,
    missing,
    s3_options,
    s3_server,
    valkey_server,
)
from tcp_proxy import TcpProxy

if TYPE_CHECKING:
    from cachetune_store import ChunkStore
    from cachetune_store.remote.objects import Objects

_numbers = itertools.count()
_AZURE = [] if shutil.which("azurite-blob") is None else ["azure"]


def eventually(true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something that a store does in the background has happened."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@dataclass
class Place:
    """A shared place, and the stores on it that a test has opened.

    Attributes:
        url, options: what a store is given.
        proxy: stands before the server, if there is one.
    """

    url: str
    options: dict[str, Any]
    proxy: TcpProxy | None = None
    timeout: float = 5.0
    stores: list[ChunkStore] = field(default_factory=list)

    def store(self, path: Path | None = None, **options: Any) -> ChunkStore:
        """A store with a directory before the place, or without one. It is closed after the test."""
        from cachetune_store import ChunkStore

        given = {"remote_options": self.options, "remote_timeout": self.timeout} | options
        store = ChunkStore(self.url, **given) if path is None else ChunkStore(path, remote=self.url, **given)
        self.stores.append(store)
        return store

    @property
    def objects(self) -> Objects:
        """What is in the place."""
        from cachetune_store.remote.places import open_objects

        return open_objects(self.url, timeout=10, options=self.options)

    def close(self) -> None:
        for store in self.stores:
            store.close()


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    if (why := missing("s3")) is not None:
        pytest.skip(why)
    with s3_server() as port:
        yield port


@pytest.fixture(scope="session")
def valkey_port() -> Iterator[int]:
    if (why := missing("valkey")) is not None:
        pytest.skip(why)
    with valkey_server() as port:
        yield port


@pytest.fixture(scope="session")
def azure_port() -> Iterator[int]:
    with azure_server() as port:
        yield port


def folder_place(tmp_path: Path) -> Place:
    if (why := missing("folder")) is not None:
        pytest.skip(why)
    return Place(f"file://{tmp_path / 'shared'}", {})


def s3_place(port: int) -> Place:
    return Place(f"s3://{BUCKET}/{next(_numbers)}", s3_options(port))


def azure_place(port: int) -> Place:
    return Place(f"az://{BUCKET}/{next(_numbers)}", azure_options(port))


def valkey_place(port: int) -> Place:
    return Place(f"valkey://127.0.0.1:{port}/{next(_numbers)}", {})


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Place]:
    """A folder that machines share."""
    place = folder_place(tmp_path)
    yield place
    place.close()


@pytest.fixture(params=["folder", "s3", "valkey", *_AZURE])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Each kind of place in turn."""
    makers: dict[str, Callable[[], Place]] = {
        "folder": partial(folder_place, tmp_path),
        "s3": lambda: s3_place(request.getfixturevalue("s3_port")),
        "valkey": lambda: valkey_place(request.getfixturevalue("valkey_port")),
        "azure": lambda: azure_place(request.getfixturevalue("azure_port")),
    }
    found = makers[request.param]()
    yield found
    found.close()


@pytest.fixture(params=["s3", "valkey", *_AZURE])
def network(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A server behind a proxy that can fail. Its `timeout` is short."""
    port = request.getfixturevalue(f"{request.param}_port")
    with TcpProxy("127.0.0.1", port) as proxy:
        found = {"s3": s3_place, "valkey": valkey_place, "azure": azure_place}[request.param](proxy.port)
        found.proxy, found.timeout = proxy, 0.4
        yield found
        proxy.fault = ""
        found.close()
