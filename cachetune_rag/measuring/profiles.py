"""Profiles: small results of measurements, such as a calibrated ratio, that later engines on the same store use.

A profile is one JSON file in the store's folder, `profiles/KIND-DIGEST.json`. The digest is that of its key, which is everything that
the result depends on (model, selector, codec, hardware, ...). The key is also in the file. A file that can't be trusted counts as
missing, because a profile can always be measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cachetune_rag.concurrency.deadline import Call, StoreTimeoutError, call_directly
from cachetune_rag.concurrency.forks import this_process
from cachetune_store import ChunkStore, StoreError, StoreReadOnlyError
from cachetune_store.files import TempFiles, explain, make_directory, write_small
from cachetune_store.plainfiles import read_plain
from cachetune_store.printing import shown
from cachetune_store.seals import CHECKSUMS, Seal

FORMAT = "cachetune-profile"
VERSION = 1
MAX_BYTES = 1 << 20
"""Bytes of the longest file that is written or read."""

_KIND = re.compile(r"[a-z]{1,32}")
_log = logging.getLogger(__name__)


class Profiles:
    """The profiles of one store. Threads may share it.

    What was loaded or found missing is remembered, so a running engine doesn't see profiles that other processes save meanwhile.

    Args:
        store: the store's folder. None, for a store in memory: profiles are kept in this object only.
        call: makes the calls that may touch its disk.
        seal: the store's; where the store has a key, a profile that was not written with it can't be trusted.
    """

    def __init__(self, store: Path | None, call: Call = call_directly, seal: Seal = CHECKSUMS):
        self._store, self._call, self._seal = store, call, seal
        self._lock, self._origin = threading.Lock(), this_process()
        self._known: dict[str, str | None] = {}

    def save(self, kind: str, key: Mapping[str, str], content: Mapping[str, Any]) -> Path | None:
        """Keep `content` under `key` and replace what was there. When this returns, it survives a crash.

        If the file can't be written, this object still keeps it.

        Args:
            kind: a word of lower-case letters that says what was measured, such as "tuning".
            key: all that the content depends on.
            content: anything that JSON can hold; no NaN or infinity.

        Returns:
            The file; None for a store in memory.

        Raises:
            ValueError: JSON can't hold content or key, or they are too large.
            StoreError: the file can't be written.
        """
        self._origin.check()
        name = _name(kind, key, self._seal)
        text = json.dumps(dict(content), allow_nan=False)
        record = {"format": FORMAT, "version": VERSION, "kind": kind, "key": dict(key), "content": json.loads(text)}
        data = json.dumps(record, indent=2).encode()
        if len(data) > MAX_BYTES:
            raise ValueError(f"the profile {kind} takes {len(data)} bytes; at most {MAX_BYTES} are kept")
        with self._lock:
            self._known[name] = text
        if self._store is None:
            return None
        path = self._store / "profiles" / name
        try:
            make_directory(path.parent)
            write_small(TempFiles(self._store / "tmp"), path, self._seal.wrap("profile", name, data))
        except OSError as error:
            raise explain(error, path) from error
        return path

    def keep(self, kind: str, key: Mapping[str, str], content: Mapping[str, Any], ratio: str) -> bool:
        """As `save`, but a store that can't be written is only logged.

        Args:
            kind, key, content: see `save`.
            ratio: what the log calls the result, such as "the tuned ratio".

        Returns:
            Whether later engines on the store will find it.
        """
        try:
            return self.save(kind, key, content) is not None
        except StoreError as error:
            _log.warning("%s holds for this engine only, since it could not be saved: %s", ratio, error)
            return False

    def load(self, kind: str, key: Mapping[str, str]) -> dict[str, Any] | None:
        """A copy of what was saved under `key`. None if nothing was, or if its file is damaged, which is logged."""
        self._origin.check()
        name = _name(kind, key, self._seal)
        with self._lock:
            known, text = name in self._known, self._known.get(name)
        if not known:
            try:
                text = self._call(self._read, name, kind, dict(key))
            except StoreTimeoutError:
                return None  # not remembered, so the next call looks for the file again
            with self._lock:
                text = self._known.setdefault(name, text)
        return None if text is None else json.loads(text)

    def _read(self, name: str, kind: str, key: dict[str, str]) -> str | None:
        if self._store is None:
            return None
        path = self._store / "profiles" / name
        try:
            data = self._seal.unwrap("profile", name, read_plain(path, MAX_BYTES + self._seal.digits))
            if data is None:
                raise ValueError("it was not written with the store's key")
            record = json.loads(data, parse_constant=_refuse)
            if not isinstance(record, dict) or record.get("format") != FORMAT:
                raise ValueError("it is no profile")
            if record.get("version") != VERSION:
                raise ValueError(f"its format version is {shown(record.get('version'))}, this release reads {VERSION}")
            if record.get("kind") != kind or record.get("key") != key or not isinstance(record.get("content"), dict):
                raise ValueError("it is another profile than its name says")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            _log.warning("profile %s is left out: %s. Measure it again to replace it.", path, error)
            return None
        return json.dumps(record["content"])


def check_savable(store: ChunkStore, what: str) -> None:
    """Refuse to measure what couldn't be saved.

    Raises:
        StoreReadOnlyError: the store can't be written.
    """
    if store.read_only:
        raise StoreReadOnlyError(
            f"the store {store.path} can only be read here, so the {what} ratio could not be saved in it: nothing was measured. "
            "Measure where this user may write the store, or pass ratio= with each request"
        )


def _name(kind: str, key: Mapping[str, str], seal: Seal) -> str:
    if not _KIND.fullmatch(kind):
        raise ValueError(f"a profile's kind is {shown(kind)}; use lower-case letters")
    wrong = [k for k, v in key.items() if not isinstance(k, str) or not isinstance(v, str)]
    if wrong:
        raise ValueError(f"a profile's key has {shown(wrong[0])}; use strings")
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
    return f"{kind}-{seal.rehashed('profile', digest)[:32]}.json"


def _refuse(name: str) -> float:
    raise ValueError(f"it holds {name}")
