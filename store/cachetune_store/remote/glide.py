"""Valkey's client, with ranges that are read straight into given memory.

The client can fill a buffer with any answer, but offers that for whole values only (`get`). So this is the one place that uses a method which
the client doesn't publish. In a version that has it otherwise, ranges are read as usual and copied, which takes a quarter longer.
"""

from __future__ import annotations

import inspect

from glide_shared.protobuf.command_request_pb2 import RequestType
from glide_sync import GlideClient

from ..errors import RemoteError
from .objects import copied

__all__ = ["RangeClient"]


class RangeClient(GlideClient):
    """A GlideClient that has `read_range`."""

    def read_range(self, key: str, start: int, area: memoryview) -> int:
        """Fill `area` with what a key's value holds from `start` on. Returns how many bytes that was; 0 if there is no such key."""
        end = start + len(area) - 1
        if not _FILLS:
            return copied(self.getrange(key, start, end), area)
        answer = self._execute_command(RequestType.GetRange, [key, str(start), str(end)], response_buffer=area)
        try:
            return int(answer)  # the number of bytes, in digits
        except (TypeError, ValueError):
            raise RemoteError(
                f"this version of valkey-glide-sync answers {answer!r} to a read into memory, where others tell the number of bytes; install another one"
            ) from None


def _fills() -> bool:
    """Whether this version's client can fill a buffer as it is used here."""
    method = getattr(GlideClient, "_execute_command", None)
    return (
        method is not None
        and hasattr(RequestType, "GetRange")
        and "response_buffer" in inspect.signature(method).parameters
    )


_FILLS = _fills()
