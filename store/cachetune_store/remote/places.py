"""Which URLs name a remote tier, and what reaches each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import StoreArgumentError
from ..printing import shown, without_password

if TYPE_CHECKING:
    from .objects import Objects

__all__ = ["is_remote", "open_objects"]

_BUCKETS = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl")
_FOLDER = "file"
_VALKEY = ("valkey", "valkeys", "redis", "rediss")
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


def is_remote(given: object) -> bool:
    """Whether a store's path is the URL of a remote place."""
    return isinstance(given, str) and _URL.match(given) is not None


def open_objects(url: object, *, timeout: float, options: Mapping[str, Any]) -> Objects:
    """What reaches the place that `url` names. Nothing is asked of it yet.

    Raises:
        StoreArgumentError: the URL names no place that can be used, or what reaches it is not installed.
    """
    match = _URL.match(url) if isinstance(url, str) else None
    scheme = match[1].lower() if match else ""
    if not isinstance(url, str) or scheme not in (*_BUCKETS, _FOLDER, *_VALKEY):
        raise StoreArgumentError(
            f"remote is {shown(without_password(url) if isinstance(url, str) else url)}; use the URL of a bucket (s3://bucket/prefix, gs://..., az://...), of a folder that machines "
            "share (file:///folder) or of a server (valkey://host:6379)"
        )
    url = scheme + url[len(scheme) :]  # what follows compares schemes as they are
    try:
        if scheme in _VALKEY:
            from .valkey import Valkey

            return Valkey(url, timeout=timeout, options=options)
        if scheme == _FOLDER:
            from .folder import Folder

            return Folder(url.rstrip("/"), timeout=timeout, options=options)
        from .bucket import Bucket

        return Bucket(url.rstrip("/"), timeout=timeout, options=options)
    except ImportError as error:
        raise StoreArgumentError(
            f"remote {without_password(url)} needs {error.name}, which is not installed: pip install 'cachetune-rag[remote]'"
        ) from error
