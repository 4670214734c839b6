"""Taking turns with vLLM's steps, where prompts can't be put together beside them: above all where a model is divided among processes.

Such a model's layers are added up over the processes ("peers") by collective calls, and peers have to make these in the same order:
two of them that wait for each other in different calls wait for ever, and calls of two communicators that run at the same time may do so
as well, whenever one peer's GPU happens to begin with the one and another's with the other. vLLM's steps make collective calls, and so does
a prompt that is put together. So they take turns, in the same order on all peers:

Every process runs the same sequence of vLLM's steps. At one point of each step, vLLM's thread asks whether on all peers the
thread that puts prompts together waits for its turn. If so, it lends the turn and waits until it has it back. While the thread has
the turn, it makes collective calls on vLLM's own stream through vLLM's own communicator. So there is one order of all calls, the same on
every peer, and nothing can be waited for that comes behind it. The thread gives the turn back when its work is done, or when it has
computed as much as a step of chunked prefill may, so that running requests don't wait longer for their next token than in any other step with
a prompt. Disks are waited for outside of turns.

A model with mixtures of experts that are vLLM's own (`packed_block.py`) takes turns as well, because vLLM's modules for these can't be called
while vLLM runs a forward; such a process may be its own only peer.

An error in the middle of a turn, on some peers but not on all, leaves them out of step. Then vLLM's thread raises, which ends the server, as an
error in vLLM's own forward does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cachetune_rag.reuse.on_device import MEANWHILE


class TurnsEndedError(Exception):
    """The server ends: no more turns are lent."""


class Turns:
    """One process's turns: lent by vLLM's thread, taken by the thread that puts prompts together.

    Args:
        failed_alike: is told an error in a turn, and says whether all peers have failed at the same place; it may wait a while for them.

    Attributes:
        changed: notified whenever the thread wants its turn.
    """

    def __init__(self, failed_alike: Callable[[BaseException], bool]):
        self._failed_alike = failed_alike
        self.changed = threading.Condition()
        self._wanted = self._lent = self._ended = False
        self._left: int | None = None
        self._error: BaseException | None = None

    # -- the thread that puts prompts together -------------------------------------------------------------------

    @contextmanager
    def taken(self, meanwhile: Callable[[], None] | None = None) -> Iterator[None]:
        """The context in which the thread has the turn.

        Args:
            meanwhile: called again and again until the turn is lent, at least once. What it raises is raised when the thread has the turn, since peers take
                it for granted that it does.

        Raises:
            TurnsEndedError: there are no more turns.
        """
        failed = self._take(meanwhile)
        try:
            if failed:
                raise failed.pop()
            yield
        except TurnsEndedError:
            raise
        except BaseException as error:
            if not self._failed_alike(error):
                self.out_of_step(error)
            raise
        finally:
            self._give_back()

    def out_of_step(self, error: BaseException) -> None:
        """Work failed here that peers may go on with."""
        with self.changed:
            self._error = error

    def spend(self, amount: int) -> None:
        """Note that so much was computed. Where the turn is used up, it is given back, and waited for again."""
        if not self._lent or self._left is None:
            return
        self._left -= amount
        if self._left <= 0:
            self._give_back()
            self._take()

    def _take(self, meanwhile: Callable[[], None] | None = None) -> list[Exception]:
        """Wait for the turn. Returns the error of `meanwhile`, if it raised one, for the caller to take out: the error refers to this frame."""
        failed: list[Exception] = []
        with self.changed:
            self._wanted = True
            self.changed.notify_all()
        while True:
            if meanwhile is not None:
                try:
                    meanwhile()
                except Exception as error:
                    failed.append(error)
                    meanwhile = None
            with self.changed:
                if self.changed.wait_for(
                    lambda: self._lent or self._ended, timeout=None if meanwhile is None else MEANWHILE
                ):
                    self._wanted = False
                    if not self._lent:
                        raise TurnsEndedError
                    return failed

    def _give_back(self) -> None:
        with self.changed:
            self._lent = False
            self.changed.notify_all()

    # -- vLLM's thread -------------------------------------------------------------------------------------------

    @property
    def wanted(self) -> bool:
        """Whether the thread waits for its turn."""
        return self._wanted

    def lend(self, amount: int | None) -> None:
        """Let the thread, which waits for its turn, have it, and wait for its end.

        Args:
            amount: how much may be computed in it; None: any amount.

        Raises:
            RuntimeError: the peers are out of step.
        """
        with self.changed:
            self._left, self._lent = amount, True
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self._lent)
        self.check()

    def check(self) -> None:
        """Refuse to go on where peers are out of step.

        Raises:
            RuntimeError: they are.
        """
        if self._error is not None:
            raise RuntimeError(
                "putting a prompt together failed on this worker while others went on, so that they are out of step: the server ends. "
                "Start it again; please open an issue with this message."
            ) from self._error

    def end(self) -> None:
        """Lend no more turns."""
        with self.changed:
            self._ended = True
            self.changed.notify_all()
