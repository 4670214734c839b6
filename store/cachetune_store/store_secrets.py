"""The secrets of one store: its key, and where it is encrypted the secrets of its tenants."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .directory import StoreDirectory
from .notes import SECRET, Notes
from .storekey import GivenKey, StoreKey

if TYPE_CHECKING:
    from .remote.shared import Shared
    from .tenants import TenantSecrets

__all__ = ["StoreSecrets"]


class StoreSecrets:
    """Has the store's key, and makes what has the tenants' secrets.

    Whether a store is encrypted is known once its directory or its shared place was read. So the tenants' secrets are made when one of these
    asks for them, and where they are kept is said by `keep_in`, once both are there. Either may come first: a directory is read before a
    shared place is known, and a shared place of a store without a directory may not answer until later.

    Args:
        given: the store's key as the caller gave it; None: it has none.
        forgotten: called with a tenant whose secrets were erased: what is in memory of it has to go.

    Attributes:
        given: the key as the caller gave it who opened the store, or who changed its key since.
        of_tenants: the secrets of tenants; None: nothing has asked for them, for nothing is encrypted as far as is known.
    """

    def __init__(self, given: GivenKey, forgotten: Callable[[str], None]) -> None:
        self.given, self._forgotten = given, forgotten
        self.of_tenants: TenantSecrets | None = None
        self._places: tuple[StoreDirectory | None, Shared | None] | None = None

    def keyring(self) -> TenantSecrets:
        """The secrets of tenants. Called only where the directory or the shared place is encrypted."""
        if self.of_tenants is None:
            # Imported here: it needs an extra.
            from .tenants import TenantSecrets

            made = TenantSecrets(self._forgotten)
            self._connect(made)
            self.of_tenants = made  # last: other threads use it from here on
        return self.of_tenants

    def keep_in(self, directory: StoreDirectory | None, shared: Shared | None) -> None:
        """Say where secrets are kept: in the directory (None: in memory), and in the shared place if there is one."""
        self._places = directory, shared
        if self.of_tenants is not None:
            self._connect(self.of_tenants)

    def look(self) -> None:
        """Forget what is in memory of tenants whose secrets another process or machine has erased."""
        if self.of_tenants is not None:
            self.of_tenants.look()

    def change_key(self, given: GivenKey, new: StoreKey) -> None:
        """Give the store another key, in its directory and in the shared place.

        Raises:
            StoreKeyError: the store has no key.
            StorePathError: the shared place can't be used, or the directory not written.
        """
        directory, shared = self._places or (None, None)
        if shared is not None:
            shared.tier.catalogue.change_key(new)
        if directory is not None:
            directory.change_key(new)
        self.given = given

    def _connect(self, secrets: TenantSecrets) -> None:
        if self._places is None:
            return
        directory, shared = self._places
        folder = None if directory is None else directory.path / "secrets"
        if directory is None:
            here = Notes(None, None, kind=SECRET)
        else:
            here = Notes(folder, directory.temp, directory.seal, kind=SECRET)
        secrets.connect(here if shared is None else shared.shared(here, secrets.is_wanted), folder)
