"""A TCP proxy that stands between a client and a server, and fails as networks and servers do."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from types import TracebackType
from typing import Self

_PIECE = 1 << 16
_UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/xml\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class TcpProxy:
    """Hands bytes on in both directions.

    Attributes:
        port: where it listens, on 127.0.0.1.
        fault: what goes wrong. "": nothing. "refuse": connections are closed at once. "stall": nothing comes back. "reset": a connection is
            reset after its first answer has begun. "garbage": bytes of long answers are changed. "unavailable": each request is answered by
            HTTP status 503.
        latency: seconds that every answer takes longer.
        rate: bytes a second that come back over all connections; 0: as many as there are.
        answered: bytes that came back.
    """

    def __init__(self, host: str, port: int) -> None:
        self._server = (host, port)
        self.fault, self.latency, self.rate, self.answered = "", 0.0, 0.0, 0
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.fault = "refuse"
        # Closing a listener doesn't wake a thread that waits for connections.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Close all connections."""
        with self._lock:
            found, self._open = self._open, set()
        for each in found:
            _close(each)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.fault == "refuse":
                _reset(client)
                continue
            try:
                server = socket.create_connection(self._server, timeout=10)
            except OSError:
                _close(client)
                continue
            server.settimeout(None)
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {client, server}
            threading.Thread(target=self._forth, args=(client, server), daemon=True).start()
            threading.Thread(target=self._back, args=(server, client), daemon=True).start()

    def _forth(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(_PIECE):
                if self.fault == "unavailable":
                    client.sendall(_UNAVAILABLE)
                    break
                if self.fault == "refuse":
                    break
                server.sendall(data)
        self._end(client, server)

    def _back(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(_PIECE):
                fault = self.fault
                if fault == "stall":
                    while self.fault == "stall":
                        time.sleep(0.01)
                    break
                if fault == "reset":
                    client.sendall(data[: len(data) // 2])
                    _reset(client)
                    break
                if fault == "garbage" and len(data) > 2000:
                    data = data[:1500] + bytes(byte ^ 1 for byte in data[1500:1600]) + data[1600:]
                if self.latency:
                    time.sleep(self.latency)
                if self.rate:
                    self._take_turn(len(data))
                self.answered += len(data)
                client.sendall(data)
        self._end(server, client)

    def _take_turn(self, count: int) -> None:
        """Wait until so many bytes may pass."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + count / self.rate
            wait = self._free_at - now
        if wait > 0:
            time.sleep(wait)

    def _end(self, *found: socket.socket) -> None:
        with self._lock:
            self._open -= set(found)
        for each in found:
            _close(each)


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
