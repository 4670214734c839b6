"""Answers several requests one after another; while one computes, the chunks of the next are read from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cachetune_rag.answering.admission import Admission
from cachetune_rag.answering.answer import Answer
from cachetune_rag.answering.executor import Executor
from cachetune_rag.answering.stream import AnswerStream
from cachetune_rag.checking.arguments import is_iterable
from cachetune_rag.errors import CacheTuneError, ConfigError
from cachetune_rag.readahead.batch import Prefetch
from cachetune_rag.text.prompts.prompt import Chunk, Prompt
from cachetune_store import changes_so_far
from cachetune_store.printing import shown


def answer_many(
    stream: Callable[..., AnswerStream],
    admission: Admission,
    executor: Executor,
    requests: Iterable[Any],
    options: Mapping[str, Any],
) -> Iterator[Answer]:
    """Does what `CacheTune.generate_many` documents.

    Args:
        stream: begins an answer: `CacheTune.stream`.
        admission, executor: find out which chunks the next request needs, and read them.
        requests: what is to be answered.
        options: arguments of all requests.
    """
    if isinstance(requests, str | bytes | Mapping | Prompt) or not is_iterable(requests):
        raise ConfigError(
            f"requests is {shown(requests)}, a {type(requests).__name__}: use a list (or another iterable) of dicts of arguments of "
            "generate, or of Prompts."
        )
    # The requests of a list are all there now; those of a generator come when they are taken.
    since = changes_so_far() if isinstance(requests, Sequence) else None
    return _answers(stream, admission, executor, iter(requests), options, since)


def _answers(
    stream: Callable[..., AnswerStream],
    admission: Admission,
    executor: Executor,
    queue: Iterator[Any],
    options: Mapping[str, Any],
    since: int | None,
) -> Iterator[Answer]:
    request = _take(queue, options, since)
    while request is not None:
        if isinstance(request, Exception):
            raise request
        following = _take(queue, options, since)
        ahead = _Ahead(admission, executor, following)
        try:
            with stream(**request) as pieces:
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
    """Reads the next request's chunks ahead, once those of the request before it are open. Raises nothing."""

    def __init__(self, admission: Admission, executor: Executor, request: Mapping[str, Any] | Exception | None):
        self._admission, self._executor = admission, executor
        self._request = None if isinstance(request, Exception) else request
        self._job: Prefetch | None = None

    def start(self) -> None:
        """Begin reading; a second call does nothing."""
        request, self._request = self._request, None
        if request is None or request.get("reuse") is False:
            return
        try:
            asked = {name: request[name] for name in ("max_kl", "min_top1") if name in request}
            config = self._admission.config(request.get("selector", "auto"), request.get("ratio", "auto"), **asked)
            self._executor.check_open()
            ids = self._admission.chunk_ids(request.get("chunks", ()), request.get("prompt"))
            self._job = self._executor.prefetch(ids, config)
        except (CacheTuneError, TypeError):
            return  # the request raises it when its turn comes

    def cancel(self) -> None:
        """Stop reading: the next request won't be made."""
        self._request = None
        if self._job is not None:
            self._job.cancel()


def _take(queue: Iterator[Any], options: Mapping[str, Any], since: int | None) -> dict[str, Any] | Exception | None:
    """The arguments of the next request; None at the end. An error is returned, to be raised when the request's turn comes.

    Args:
        queue: the requests that are left.
        options: arguments of all requests.
        since: when the request was made (`changes_so_far`), because documents may be removed before its turn. None: now.
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
