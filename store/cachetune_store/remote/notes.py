"""Notes on which all machines agree: the first one that is written under a name in the remote place stays."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..errors import ErasedChunkError, RemoteError, StoreKeyError, StoreReadOnlyError
from ..notes import MAX_NOTE_FILE, Notes, file_name, folder_name, unwrapped, wrapped
from ..seals import Seal
from .breaker import Breaker
from .objects import Objects

__all__ = ["SharedNotes"]


class SharedNotes(Notes):
    """The notes of a store with a remote tier. Those of the remote place hold; the store keeps copies for when that doesn't answer.

    Args:
        local: the store's own notes.
        objects: the remote place.
        breaker: says whether it may be asked.
        failed: called with the error of a request that failed.
        seal: what makes and checks the sums of notes there; it may have to ask the place.
        wanted: whether a tenant's note that is missing there, and was found here, may be written there.
    """

    def __init__(
        self,
        local: Notes,
        objects: Objects,
        breaker: Breaker,
        failed: Callable[[Exception], None],
        seal: Callable[[], Seal],
        wanted: Callable[[str, bytes], bool] = lambda tenant, content: True,
    ) -> None:
        super().__init__(None, None, kind=local.kind)
        self._wanted = wanted
        self._place_seal = seal
        self._local, self._objects, self._breaker, self._failed = local, objects, breaker, failed
        self._agreed: set[tuple[str, str]] = set()
        self._agreeing = threading.Lock()

    def get(self, tenant: str, name: str) -> bytes | None:
        """See Notes. A note is compared with the remote place once; it never changes there."""
        try:
            return self.get_surely(tenant, name)
        except (RemoteError, StoreKeyError):
            return self._local.get(tenant, name)

    def get_surely(self, tenant: str, name: str) -> bytes | None:
        """See Notes."""
        mine = self._local.get(tenant, name)
        if (tenant, name) in self._agreed and mine:
            return mine
        if not self._breaker.closed:
            raise RemoteError(f"the remote tier failed: {self._breaker.reason}")
        try:
            return self._agree(tenant, name, mine)
        except (RemoteError, StoreKeyError) as error:
            self._failed(error)
            raise

    def write_first(self, tenant: str, name: str, content: bytes) -> bytes:
        """See Notes.

        Raises:
            RemoteError: the remote place can't be used. Nothing is written then, because the machines would not agree.
        """
        if self._put(tenant, name, content):
            self._keep(tenant, name, content)
            return content
        agreed = self._agree(tenant, name, self._local.get(tenant, name))
        if not agreed:
            # What stands there was forged or damaged.
            self._objects.delete([self._object(tenant, name)])
            agreed = self._agree(tenant, name, content)
        return agreed or content

    def set_aside(self, tenant: str, name: str, content: bytes) -> bool:
        """See Notes. A note that is damaged in the remote place is deleted there."""
        found = self._find(tenant, name)
        if found == content:
            self._objects.delete([self._object(tenant, name)])
        with self._agreeing:
            self._agreed.discard((tenant, name))
        return self._local.set_aside(tenant, name, content) or found == content

    def delete_all(self, tenant: str) -> None:
        """See Notes."""
        self._local.delete_all(tenant)
        with self._agreeing:
            self._agreed = {place for place in self._agreed if place[0] != tenant}
        self._objects.delete(list(self._objects.names(f"{self._place_folder(tenant)}/")))

    @property
    def here(self) -> Notes:
        """See Notes."""
        return self._local

    def replace(self, tenant: str, name: str, content: bytes) -> None:
        """See Notes.

        Raises:
            RemoteError: it can't be written in the remote place now. Here it is.
        """
        self._local.replace(tenant, name, content)
        with self._agreeing:
            self._agreed.discard((tenant, name))
        self._objects.put(self._object(tenant, name), [wrapped(self._place_seal(), self.kind, tenant, name, content)])

    def forget(self, tenant: str) -> None:
        """See Notes."""
        self._local.delete_all(tenant)
        with self._agreeing:
            self._agreed = {place for place in self._agreed if place[0] != tenant}

    def _agree(self, tenant: str, name: str, mine: bytes | None) -> bytes | None:
        theirs = self._find(tenant, name)
        if theirs == b"" and mine:
            # Forged or damaged there, and whole here: it is put back, so that nobody agrees on another one.
            self._objects.delete([self._object(tenant, name)])
            theirs = None
        if theirs == b"":
            return theirs
        if theirs is None:
            if not mine or not self._wanted(tenant, mine) or not self._put(tenant, name, mine):
                return mine
            theirs = mine
        if theirs != mine:
            if mine is not None:
                self._local.set_aside(tenant, name, mine)
            self._keep(tenant, name, theirs)
        with self._agreeing:
            self._agreed.add((tenant, name))
        return theirs

    def _find(self, tenant: str, name: str) -> bytes | None:
        """The note in the remote place; None if there is none, b"" if it was forged."""
        raw = self._objects.get(self._object(tenant, name), MAX_NOTE_FILE)
        try:
            return None if raw is None else unwrapped(self._place_seal(), self.kind, tenant, name, raw)
        except ErasedChunkError:  # see Notes.get
            self._objects.delete([self._object(tenant, name)])
            return None

    def _put(self, tenant: str, name: str, content: bytes) -> bool:
        raw = wrapped(self._place_seal(), self.kind, tenant, name, content)
        return self._objects.put(self._object(tenant, name), [raw], create=True)

    def _keep(self, tenant: str, name: str, content: bytes) -> None:
        try:
            self._local.write_first(tenant, name, content)
        except StoreReadOnlyError:
            return

    def _place_folder(self, tenant: str) -> str:
        return f"{self.kind}s/{folder_name(self._place_seal(), tenant)}"

    def _object(self, tenant: str, name: str) -> str:
        return f"{self._place_folder(tenant)}/{file_name(self._place_seal(), name)}"
