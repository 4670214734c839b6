"""With which settings a store is opened: its constructor's arguments, checked before anything is made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from .arguments import check_flag, check_kind
from .codecs import get_codec
from .errors import StoreArgumentError
from .paths import store_path
from .printing import shown, without_password
from .remote.places import is_remote
from .storekey import GivenKey, StoreKey
from .units import parse_bytes

__all__ = ["StoreSettings"]

_LEAST_IDLE = 256 << 20
_MOST_SECONDS = 86_400


class StoreSettings:
    """The arguments of `ChunkStore`, checked and parsed. None of them is changed later.

    Attributes:
        path: the directory, absolute; None: there is none.
        remote_url: the shared place, with a password that may be in it; None: there is none.
        remote: the same without the password, for messages.
        codec, remote_codec: names of codecs. `remote_codec` is None if chunks go to the shared place as they are here.
        host_bytes, disk_bytes, device_bytes: the tiers' budgets.
        device: of the device tier; None if it has no budget.
        idle_bytes: unused host memory that is kept for later reads.
        pinned: whether host memory is page-locked.
        direct_io: whether to read around the page cache; None: if the file system supports it.
        remote_timeout: seconds that a read from the shared place may take.
        remote_options: further arguments of the client that reaches it.
        given_key, key: the store's key as it was given, and itself; None: there is none.
        encrypt: whether a new store is encrypted; None: that wasn't said.

    Raises:
        StoreArgumentError: an argument can't be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        codec: str,
        host_budget: int | str,
        disk_budget: int | str,
        device_budget: int | str,
        device: str | torch.device | None,
        read_memory: int | str | None,
        pin_memory: bool | None,
        direct_io: bool | None,
        remote: str | None,
        remote_codec: str | None,
        remote_timeout: float,
        remote_options: Mapping[str, Any] | None,
        store_key: GivenKey,
        encrypt: bool | None,
    ) -> None:
        if is_remote(path):
            if remote is not None:
                raise StoreArgumentError(
                    f"the store's path is the URL {shown(without_password(str(path)))}, and remote is {shown(without_password(str(remote)))}: use a folder as the path, or leave remote out"
                )
            remote, path = str(path), None
        self.path = None if path is None else store_path(path)
        self.remote_url = remote
        self.remote = None if remote is None else without_password(str(remote))
        self.given_key, self.key = store_key, StoreKey.given(store_key)
        if self.key is not None and path is None and remote is None:
            raise StoreArgumentError(
                "store_key is given for a store in memory only, where there is nothing to protect: leave it out, or give the store a path"
            )
        if encrypt is not None:
            check_flag(encrypt, "encrypt")
        if encrypt and self.key is None:
            raise StoreArgumentError(
                "encrypt is True, and no store_key is given: give a key as well, made for example by `openssl rand -hex 32`, or leave encrypt out"
            )
        self.encrypt = encrypt
        self.codec = get_codec(codec).name
        self.host_bytes, self.disk_bytes = (
            parse_bytes(host_budget, "host_budget"),
            parse_bytes(disk_budget, "disk_budget"),
        )
        self.pinned = _pinned(pin_memory)
        if direct_io is not None:
            check_flag(direct_io, "direct_io")
        self.direct_io = direct_io
        self.idle_bytes = (
            max(self.host_bytes // 8, _LEAST_IDLE) if read_memory is None else parse_bytes(read_memory, "read_memory")
        )
        self.device_bytes = parse_bytes(device_budget, "device_budget")
        self.device = _device(self.device_bytes, device) if self.device_bytes else None
        if remote_options is not None:
            check_kind(
                remote_options,
                Mapping,
                "remote_options",
                "use a dict of arguments of what reaches the shared place (docs/scale.md), or None",
            )
        self.remote_options = remote_options or {}
        self.remote_timeout, self.remote_codec = remote_timeout, remote_codec
        if remote is not None:
            self.remote_timeout = _seconds(remote_timeout)
            self.remote_codec = None if remote_codec is None else get_codec(remote_codec).name


def _pinned(pin_memory: bool | None) -> bool:
    if pin_memory is None:
        return torch.cuda.is_available()
    check_flag(pin_memory, "pin_memory")
    if pin_memory and not torch.cuda.is_available():
        raise StoreArgumentError("pin_memory is True, but there is no CUDA device; leave it out or set it to False")
    return pin_memory


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MOST_SECONDS:
        raise StoreArgumentError(f"remote_timeout is {shown(value)}; use seconds above 0")
    return float(value)


def _device(budget: int, device: str | torch.device | None) -> torch.device:
    try:
        place = torch.device("cuda" if device is None else device)
    except (TypeError, RuntimeError, ValueError, OverflowError) as error:
        raise StoreArgumentError(f"device is {shown(device)}; use such as 'cuda' or 'cuda:0'") from error
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise StoreArgumentError(
                f"device_budget is {budget}, but there is no CUDA device; leave it out or set it to 0"
            )
        return torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)
    if place.type != "cpu":
        raise StoreArgumentError(
            f"device is {shown(str(device))}; a tier can be kept on a CUDA device (or, for tests, on 'cpu')"
        )
    return place
