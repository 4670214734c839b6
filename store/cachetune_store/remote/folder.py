"""Objects in a folder that machines share.

They are written, listed and deleted through obstore, which writes them whole or not at all. They are read by the system's own calls: straight into
the memory of rows, where obstore would fill new memory that has to be copied.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import MissingObjectError, RemoteError, RemoteRefusedError
from ..plainfiles import UnfitFileError, open_plain
from .bucket import Bucket

__all__ = ["Folder"]


class Folder(Bucket):
    """A folder, given as "file:///folder". Arguments as for `Bucket`."""

    def __init__(self, url: str, *, timeout: float, options: Mapping[str, Any]) -> None:
        super().__init__(url, timeout=timeout, options=options)
        self._folder = str(self._reads.prefix)

    def get(self, name: str, limit: int) -> bytes | None:
        """See Objects."""
        try:
            with self._opened(name) as file:
                size = os.fstat(file).st_size
                if size > limit:
                    raise RemoteError(f"{self.place}/{name} has {size} bytes; at most {limit} are read")
                content = memoryview(bytearray(size))
                return bytes(content[: _fill(file, 0, content)])
        except MissingObjectError:
            return None

    def read(self, name: str, starts: Sequence[int], areas: Sequence[memoryview]) -> list[int]:
        """See Objects."""
        # What stands in the place of a chunk's file and isn't one is as good as no chunk: it is computed and stored again.
        with self._opened(name, unfit=MissingObjectError) as file:
            return [_fill(file, start, area) for start, area in zip(starts, areas, strict=True)]

    @contextlib.contextmanager
    def _opened(self, name: str, *, unfit: type[RemoteError] = RemoteError) -> Iterator[int]:
        """A descriptor of an object's file. Errors are raised as those of Objects, and as `unfit` if it is no plain file."""
        if not all(part.strip(".") for part in name.split("/")):
            raise RemoteError(
                f"{name!r} is no name of an object in {self.place}: a part of it is empty or has dots alone"
            )
        try:
            file = open_plain(f"{self._folder}/{name}")
            try:
                yield file
            finally:
                os.close(file)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingObjectError(f"there is no {self.place}/{name}") from error
        except PermissionError as error:
            raise RemoteRefusedError(
                f"{self.place} refuses to read ({error.strerror}); check who may read the folder"
            ) from error
        except UnfitFileError as error:
            raise unfit(f"can't read {self.place}/{name} ({error})") from error
        except OSError as error:
            raise RemoteError(f"can't read {self.place}/{name} ({error})") from error


def _fill(file: int, start: int, area: memoryview) -> int:
    """Fill `area` with what the file holds from `start` on. Returns how many bytes there were."""
    done = 0
    while done < len(area):
        count = os.preadv(file, [area[done:]], start + done)
        if not count:
            break
        done += count
    return done
