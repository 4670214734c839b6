"""Objects in S3, Google Cloud Storage or Azure, and what is written to a folder (folder.py), through obstore.

Credentials come from where obstore looks for them (the environment, or the machine's own role), or from the options.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import from_url

from ..errors import MissingObjectError, RemoteError, RemoteRefusedError, StoreArgumentError, StorePathError
from ..printing import shown, without_password
from .objects import Buffer, Objects, copied

__all__ = ["Bucket"]

_COALESCE = 16 << 10
"""Ranges that lie no further apart are read together: less than what a request costs."""
_WHOLE = 8 << 20
"""Objects up to this size are written by one request, larger ones in parts."""
_PART = 8 << 20
_WRITE_SECONDS = 60.0
"""Seconds that one request of an upload may take. Uploads are done behind answers, and are larger than reads."""
_BEYOND_END = ("InvalidRange", "Range Not Satisfiable")
"""What is in obstore's errors when an object ends before a range begins: from folders, S3 and Azure, and the name of HTTP's status 416."""
_REFUSED = (PermissionDeniedError, UnauthenticatedError)
_MESSAGE = 300


class Bucket(Objects):
    """A bucket, or what is below a prefix of it.

    Args:
        url: such as "s3://bucket/prefix", "gs://...", "az://..." or "file:///folder".
        timeout: seconds that a read may take, further tries included.
        options: further arguments of obstore's `from_url`, such as `endpoint`.
    """

    def __init__(self, url: str, *, timeout: float, options: Mapping[str, Any]) -> None:
        self.place = without_password(url.rstrip("/"))
        given = dict(options)
        client, retry = (_dict(given.pop(name, {}), name) for name in ("client_options", "retry_config"))
        if url.startswith("file:"):
            given.setdefault("mkdir", True)
        try:
            self._reads = from_url(url, **_settings(url, client, retry, timeout), **given)
            self._writes = from_url(url, **_settings(url, client, retry, max(timeout, _WRITE_SECONDS)), **given)
        except (BaseError, TypeError, ValueError) as error:
            raise StoreArgumentError(
                f"remote {self.place} can't be used, or remote_options not with it: {_said(error)}; see docs/scale.md"
            ) from error
        except OSError as error:
            raise StorePathError(
                f"remote {self.place} can't be used ({_said(error)}): give a folder that is there, or that this user can make"
            ) from error

    def get(self, name: str, limit: int) -> bytes | None:
        """See Objects."""
        try:
            with self._translated("read", name):
                found = obstore.get(self._reads, name)
                if found.meta["size"] > limit:
                    raise RemoteError(f"{self.place}/{name} has {found.meta['size']} bytes; at most {limit} are read")
                return bytes(found.bytes())
        except MissingObjectError:
            return None

    def read(self, name: str, starts: Sequence[int], areas: Sequence[memoryview]) -> list[int]:
        """See Objects."""
        asked = _merged(starts, list(map(len, areas)))
        with self._translated("read", name):
            raw = self._ranges(name, asked)
        counts = []
        for start, area in zip(starts, areas, strict=True):
            at = next(number for number, (begin, end) in enumerate(asked) if begin <= start < end)
            begin = start - asked[at][0]
            counts.append(copied(memoryview(raw[at])[begin : begin + len(area)], area))
        return counts

    def _ranges(self, name: str, asked: list[tuple[int, int]]) -> Sequence[Any]:
        """What is between these begins and ends. It is empty where the object ends before, which obstore says by an error."""
        begins, ends = [begin for begin, _ in asked], [end for _, end in asked]
        try:
            if len(asked) == 1:
                return [obstore.get_range(self._reads, name, start=begins[0], end=ends[0])]
            return obstore.get_ranges(self._reads, name, starts=begins, ends=ends, coalesce=0)
        except BaseError as error:
            if not any(words in str(error) for words in _BEYOND_END):
                raise
        # One of the ranges is beyond the end: the others are asked for one by one.
        return [b""] if len(asked) == 1 else [self._ranges(name, [each])[0] for each in asked]

    def put(self, name: str, parts: Sequence[Buffer], *, create: bool = False) -> bool:
        """See Objects."""
        size = sum(map(len, parts))
        try:
            with self._translated("write", name):
                if create or size <= _WHOLE:
                    mode = "create" if create else "overwrite"
                    obstore.put(self._writes, name, b"".join(parts), mode=mode, use_multipart=False)
                else:
                    obstore.put(self._writes, name, _pieces(parts), chunk_size=_PART)
        except FileExistsError:
            return False
        return True

    def delete(self, names: Iterable[str]) -> None:
        """See Objects."""
        for name in names:
            with contextlib.suppress(MissingObjectError), self._translated("delete", name):
                obstore.delete(self._writes, name)

    def names(self, prefix: str) -> Iterator[str]:
        """See Objects."""
        with self._translated("list", prefix):
            for page in obstore.list(self._reads, prefix.rstrip("/")):
                for found in page:
                    yield found["path"]

    def close(self) -> None:
        """See Objects. Connections end with the object."""

    @contextlib.contextmanager
    def _translated(self, what: str, name: str) -> Iterator[None]:
        """Raise obstore's errors as those of Objects."""
        try:
            yield
        except (AlreadyExistsError, PreconditionError) as error:
            raise FileExistsError(name) from error
        except (NotFoundError, FileNotFoundError) as error:
            if "NoSuchBucket" in str(error):
                raise RemoteRefusedError(f"{self.place}: there is no such bucket; make it first") from error
            raise MissingObjectError(f"there is no {self.place}/{name}") from error
        except _REFUSED as error:
            raise RemoteRefusedError(
                f"{self.place} refuses to {what} ({_said(error)}); check the credentials and what they allow"
            ) from error
        except (BaseError, OSError) as error:
            raise RemoteError(f"can't {what} {self.place}/{name} ({_said(error)})") from error


def _settings(url: str, client: dict[str, Any], retry: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Timeouts and tries, unless they are given. A folder has none."""
    if url.startswith("file:"):
        return {}
    timeout = timedelta(seconds=seconds)
    wait = {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=1), "base": 2}
    return {
        "client_options": {"timeout": timeout, "connect_timeout": min(timeout, timedelta(seconds=2))} | client,
        "retry_config": {"max_retries": 3, "retry_timeout": timeout, "backoff": wait} | retry,
    }


def _dict(given: Any, name: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise StoreArgumentError(
            f"{name} in remote_options is {shown(given)}; use a dict, as obstore takes it (docs/scale.md)"
        )
    return dict(given)


def _merged(starts: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Begins and ends of the ranges to ask for. obstore merges ranges, too, but breaks off if an object ends before the second of them."""
    merged: list[tuple[int, int]] = []
    for start, length in sorted(zip(starts, lengths, strict=True)):
        if merged and start <= merged[-1][1] + _COALESCE:
            merged[-1] = merged[-1][0], max(merged[-1][1], start + length)
        else:
            merged.append((start, start + length))
    return merged


def _pieces(parts: Sequence[Buffer]) -> Iterator[Buffer]:
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), _PART):
            yield view[start : start + _PART]


def _said(error: BaseException) -> str:
    """The first line of what obstore says, which goes on with its inner state."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:_MESSAGE]
