"""The thread that tells the others what changed here, and reads what they changed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from ..errors import RemoteError, StoreError, StoreKeyError
from .breaker import Breaker
from .catalogue import Catalogue

__all__ = ["Sync"]

POLL_SECONDS = 2.0
"""Seconds between two looks for changes that others have made."""
_LOOK_FAR = 150
"""Every so many looks, a newer snapshot is looked for as well: changes may have been deleted while this machine was asleep."""
_LEAVE_SECONDS = 30.0

_log = logging.getLogger(__name__)


class Sync:
    """Keeps a catalogue up to date, in the background.

    Args:
        catalogue: what is kept up to date.
        breaker: says whether the place may be asked, and is told whether it answered.
        healed: calls a function and repairs the index if it turns out to be damaged.
        failed: called with the error of a round that failed.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        breaker: Breaker,
        healed: Callable[[Callable[[], object]], object],
        failed: Callable[[Exception], None],
    ) -> None:
        self._catalogue, self._breaker, self._healed, self._failed = catalogue, breaker, healed, failed
        self._wanted = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cachetune-remote", daemon=True)
        self._failing_since: float | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """Something has changed here."""
        self._wanted.set()

    def now(self) -> None:
        """Tell and read everything on the caller's thread.

        Raises:
            RemoteError: the place can't be used.
        """
        self._healed(lambda: (self._catalogue.publish(), self._catalogue.catch_up()))
        self._breaker.worked()

    def close(self) -> None:
        """Tell the others what they don't know yet, if the place answers, and end. What is left waits in the outbox."""
        self._stop.set()
        self._wanted.set()
        if self._thread.is_alive():
            self._thread.join(_LEAVE_SECONDS)
        if not self._thread.is_alive() and self._breaker.closed:
            try:
                if self._catalogue.waiting:
                    self._catalogue.publish()
            except StoreError as error:
                _log.warning("the remote tier was not told of the last changes (%s)", error)

    def _run(self) -> None:
        rounds = 0
        while not self._stop.is_set():
            self._wanted.wait(max(POLL_SECONDS, self._breaker.wait))
            self._wanted.clear()
            if self._stop.is_set() or not self._breaker.closed:
                continue
            rounds += 1
            try:
                self._healed(self._catalogue.publish)
                self._healed(lambda: self._catalogue.catch_up(look_far=rounds % _LOOK_FAR == 0))  # noqa: B023 (called at once)
            except (RemoteError, StoreKeyError) as error:
                self._failed(error)
                self._tell(error)
            except Exception:  # the thread must go on: nothing else would tell the others
                _log.exception("the remote tier's catalogue could not be brought up to date")
                self._stop.wait(POLL_SECONDS)
            else:
                self._breaker.worked()
                if self._failing_since is not None:
                    _log.warning("the remote tier answers again after %.0f s", time.monotonic() - self._failing_since)
                self._failing_since = None

    def _tell(self, error: StoreError) -> None:
        """Say once that the place doesn't answer."""
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            _log.warning(
                "%s. Chunks that only it has are computed; what changes here is told when it answers again", error
            )
