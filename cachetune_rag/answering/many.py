"""Several requests one after another, each one's chunks read from disk while the one before it computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cachetune_rag.checking.arguments import is_iterable
from cachetune_rag.errors import CacheTuneError, ConfigError
from cachetune_rag.readahead.prefetcher import Prefetch
from cachetune_rag.text.prompts.prompt import Chunk, Prompt
from cachetune_store import changes_so_far
from cachetune_store.printing import shown

if TYPE_CHECKING:
    from cachetune_rag.answering.answer import Answer
    from cachetune_rag.engine import CacheTune


def generate_many(engine: CacheTune, requests: Iterable[Any], options: Mapping[str, Any]) -> Iterator[Answer]:
    """See `CacheTune.generate_many`."""
    if isinstance(requests, str | bytes | Mapping | Prompt) or not is_iterable(requests):
        raise ConfigError(
            f"requests is {shown(requests)}, a {type(requests).__name__}: use a list (or another iterable) of dicts of arguments of "
            "generate, or of Prompts."
        )
    # The requests of a list are all there now; those of a generator come when they are taken.
    since = changes_so_far() if isinstance(requests, Sequence) else None
    return _answers(engine, iter(requests), options, since)


def _answers(
    engine: CacheTune, queue: Iterator[Any], options: Mapping[str, Any], since: int | None
) -> Iterator[Answer]:
    request = _take(queue, options, since)
    while request is not None:
        if isinstance(request, Exception):
            raise request
        following = _take(queue, options, since)
        ahead = _Ahead(engine, following)
        try:
            with engine.stream(**request) as pieces:
                pieces.looked_up = ahead.start
                for _ in pieces:
                    pass
                answer = pieces.answer
            yield answer
        except BaseException:
            ahead.cancel()
            raise
        request = following


class _Ahead:
    """The next request's chunks: opened once those of the request before it are, and read from when the disk is free. Raises nothing."""

    def __init__(self, engine: CacheTune, request: Mapping[str, Any] | Exception | None):
        self._engine = engine
        self._request = None if isinstance(request, Exception) else request
        self._job: Prefetch | None = None

    def start(self) -> None:
        """Begin, once."""
        request, self._request = self._request, None
        if request is None or request.get("reuse") is False:
            return
        try:
            config = self._engine.runtime.admission.config(
                request.get("selector", "auto"), request.get("ratio", "auto")
            )
            self._job = self._engine.runtime.admission.prefetch(
                request.get("chunks", ()), request.get("prompt"), config
            )
        except (CacheTuneError, TypeError):
            return  # the request itself will say so, when it is its turn

    def cancel(self) -> None:
        """The next request won't come."""
        self._request = None
        if self._job is not None:
            self._job.cancel()


def _take(queue: Iterator[Any], options: Mapping[str, Any], since: int | None) -> dict[str, Any] | Exception | None:
    """Arguments of the next request; None at the end. An error waits until it is the request's turn.

    Args:
        queue: where it is taken from.
        options: arguments of all requests.
        since: when it came (`changes_so_far`): documents may be removed before its turn. None: it comes now.
    """
    try:
        request = next(queue)
    except StopIteration:
        return None
    except Exception as error:
        return error
    if isinstance(request, Prompt):
        return {**options, "prompt": request}
    if isinstance(request, Mapping):
        if wrong := [name for name in request if not isinstance(name, str)]:
            return ConfigError(
                f"a request has an argument named {shown(wrong[0])}: use the names of generate's arguments."
            )
        taken = {**options, **request}
        if isinstance(chunks := taken.get("chunks"), Iterator):
            try:
                taken["chunks"] = list(chunks)  # they are read twice: ahead, and by the request
            except Exception as error:
                return error
        if isinstance(chunks := taken.get("chunks"), list | tuple):
            came = changes_so_far() if since is None else since
            taken["chunks"] = [_known_since(chunk, came) for chunk in chunks]
        return taken
    return ConfigError(
        f"a request is a {type(request).__name__}: use a dict of arguments of generate (query, chunks, ...), or a Prompt."
    )


def _known_since(chunk: Any, since: int) -> Any:
    return replace(chunk, since=since) if isinstance(chunk, Chunk) and chunk.since is None else chunk
