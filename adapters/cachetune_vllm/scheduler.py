"""The scheduler's side of the connector: which requests reuse stored chunks, when their prompts are put together, and what
is reported of them.

Nothing here touches the model. vLLM calls it from the loop that plans each step, so every method is quick.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cachetune_rag.text.prompts.segments import Prompt
from cachetune_vllm.beam_search import is_beam
from cachetune_vllm.logs import logger
from cachetune_vllm.messages import FromWorker, Load, ToWorkers
from cachetune_vllm.metrics import ReuseStats
from cachetune_vllm.settings import REQUEST_KEY, RequestSettings, RequestSettingsError, ServerSettings

if TYPE_CHECKING:
    from vllm.v1.request import Request

_log = logger(__name__)

Recognise = Callable[[Sequence[int], RequestSettings], Prompt | None]
"""Finds a request's chunks in its token ids; None where there are none."""


@dataclass(eq=False)
class _Reusing:
    """A request that reuses chunks, from its arrival to its end.

    Attributes:
        request: vLLM's own object.
        prompt: its prompt, with the chunks that were found.
        settings: its settings.
        loading: whether its prompt is being put together.
        failed: whether putting it together failed, so that vLLM computes the prompt.
        report: its report, once there is one.
    """

    request: Request
    prompt: Prompt
    settings: RequestSettings
    loading: bool = False
    failed: bool = False
    report: dict[str, Any] = field(default_factory=dict)


class ReuseScheduler:
    """Decides over the requests of one engine core. Not for several threads: vLLM calls it from one.

    Args:
        settings: the server's.
        block_size: tokens in a page of vLLM's cache.
        recognise: finds chunks in token ids.
        most_tokens: prompts with more tokens are left to vLLM, for want of memory; None: no bound.

    Attributes:
        stats: what was counted since vLLM last asked.
    """

    def __init__(self, settings: ServerSettings, block_size: int, recognise: Recognise, most_tokens: int | None = None):
        self._settings, self._block_size, self._recognise = settings, block_size, recognise
        self._most_tokens = most_tokens
        self._requests: dict[str, _Reusing] = {}
        self._told: dict[str, dict[str, Any]] = {}  # reports for requests that gave settings, but are left to vLLM
        self._loads: list[Load] = []
        self._given_up: set[str] = set()
        self._loading = 0
        self.stats = ReuseStats()

    def arrived(self, request: Request) -> None:
        """A request came. Where it will reuse chunks, its pages get hashes of their own.

        vLLM finds a page by the hash of all tokens up to its end. A page with reused keys and values must not be found by requests
        that compute theirs, so from the first page with a token of a chunk on, the hashes also depend on the whole prompt and its
        settings: only the same prompt at the same settings finds such a page. The pages before it hold what vLLM would compute,
        and keep their hashes.
        """
        given = (request.kv_transfer_params or {}).get(REQUEST_KEY)
        try:
            settings = RequestSettings.of(given, self._settings)
        except RequestSettingsError as error:
            # A server with the middleware has answered such a request with status 400 already.
            _log.warning("request %s: %s It is answered without reuse.", request.request_id, error)
            self._leave(request, "settings", given, str(error))
            return
        reason = why_not(request) if settings.reuse else "asked"
        if reason is not None:
            self._leave(request, reason, given)
            return
        assert request.prompt_token_ids is not None
        if self._most_tokens is not None and len(request.prompt_token_ids) > self._most_tokens:
            self._leave(request, "memory", given)
            return
        if settings.ratio == 1 or settings.selector == "all":
            self._leave(request, "all recomputed", given)
            return
        prompt = self._recognise(request.prompt_token_ids, settings)
        if prompt is None or not prompt.spans:
            self._leave(request, "nothing found", given)
            return
        if reusable(prompt, 0, _end(request)) < self._settings.least_reused:
            self._leave(request, "few", given)
            return
        self._requests[request.request_id] = _Reusing(request, prompt, settings)
        first = min(span.start for span in prompt.spans) // self._block_size
        salt_hashes(request.block_hashes, first, _digest(prompt, settings))

    def matched(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """How many tokens behind the first `computed` ones will be put together, and that this happens between steps.

        None where vLLM should ask again in its next step.
        """
        reusing = self._requests.get(request.request_id)
        if reusing is None:
            return 0, False
        end = _end(request)
        # After an equal prompt, most pages may be in vLLM's cache. The rest is put together as well, however little it is: otherwise
        # vLLM would compute tokens that are to be reused, and the answer could differ from that to the equal prompt.
        if reusing.failed or not reusable(reusing.prompt, computed, end):
            if not reusing.report:
                reusing.report = {"reused": reusable(reusing.prompt, 0, computed), "left": "same prompt"}
            return 0, False
        if self._loading >= self._settings.loads_at_once:
            return None, False
        return end - computed, True

    def allocated(self, request: Request, blocks: Sequence[int], count: int) -> None:
        """Pages were given to a request; `count` of its tokens are to be put together there (0: none)."""
        if not count:
            return
        reusing = self._requests[request.request_id]
        settings, end = reusing.settings, _end(request)
        self._loads.append(
            Load(
                request.request_id, reusing.prompt, settings.selector, settings.ratio, settings.tenant, tuple(blocks),
                end - count, end,
            )
        )  # fmt: skip
        reusing.loading = True
        self._loading += 1

    def to_workers(self, idle: bool) -> ToWorkers:
        """What the workers are told with this step."""
        message = ToWorkers(tuple(self._loads), frozenset(self._given_up), idle)
        self._loads, self._given_up = [], set()
        return message

    def reported(self, told: FromWorker) -> None:
        """Take in the workers' reports of prompts."""
        for request_id, report in told.reports.items():
            if "left" in report:
                self.stats.add_left(report["left"])
            else:
                self.stats.add_report(report)
            reusing = self._requests.get(request_id)
            if reusing is not None:
                reusing.report = report
                # vLLM would ask for the same again, since none of it is computed yet.
                reusing.failed = "left" in report
                _count_cached(reusing.request, report["reused"])

    def loaded(self, request_ids: Sequence[str] | set[str]) -> None:
        """Prompts are in vLLM's pages, or failed, or were given up: their place is free for others."""
        self._loading -= len(request_ids)
        for request_id in request_ids:
            reusing = self._requests.get(request_id)
            if reusing is not None:
                reusing.loading = False

    def take_stats(self) -> ReuseStats | None:
        """What was counted since the last call; None if nothing was."""
        if self.stats.is_empty():
            return None
        stats, self.stats = self.stats, ReuseStats()
        return stats

    def finished(self, request: Request) -> dict[str, Any] | None:
        """A request is over, in whatever way. Returns what its response says of reuse; None if there is nothing to say."""
        told = self._told.pop(request.request_id, None)
        reusing = self._requests.pop(request.request_id, None)
        if reusing is None:
            return None if told is None else {REQUEST_KEY: told}
        if reusing.loading:
            self._given_up.add(request.request_id)
        if reusing.report.get("left") == "same prompt":
            self.stats.add_left("same prompt")
        return {REQUEST_KEY: reusing.report} if reusing.report else None

    def _leave(self, request: Request, reason: str, asked: object, error: str | None = None) -> None:
        """Leave a request to vLLM."""
        self.stats.add_left(reason)
        if asked is not None:
            self._told[request.request_id] = {"reused": 0, "left": reason, **({"error": error} if error else {})}


def why_not(request: Request) -> str | None:
    """Why a request can't reuse chunks: what it asks for needs keys, values or hidden states that only vLLM computes."""
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return "embeddings"
    if request.pooling_params is not None:
        return "pooling"
    if request.lora_request is not None:
        return "lora"
    if request.mm_features:
        return "images"
    if request.resumable:
        return "streamed input"
    if request.sampling_params is not None and request.sampling_params.prompt_logprobs is not None:
        return "prompt logprobs"
    if request.skip_reading_prefix_cache:
        return "no prefix cache"
    # Put together once a token and beam, since what is recomputed depends on the whole prompt; vLLM finds all but one token in its cache.
    if is_beam(request):
        return "beam search"
    return None


def reusable(prompt: Prompt, computed: int, end: int) -> int:
    """Tokens of chunks that stand in [computed, end)."""
    return sum(max(0, min(span.end, end) - max(span.start, computed)) for span in prompt.spans)


def salt_hashes(hashes: list[bytes], first: int, salt: bytes) -> None:
    """Change the hashes of pages from number `first` on. Later pages' hashes follow from the last one, so they differ as well."""
    for number in range(first, len(hashes)):
        hashes[number] = hashlib.sha256(salt + hashes[number]).digest()


def _count_cached(request: Request, reused: int) -> None:
    """Make a response's usage count only the reused tokens as cached. vLLM has counted all tokens that were put together."""
    stats = request.prefill_stats
    if stats is not None:
        stats.set(
            num_prompt_tokens=stats.num_prompt_tokens,
            num_local_cached_tokens=stats.num_local_cached_tokens,
            num_external_cached_tokens=min(reused, stats.num_external_cached_tokens),
        )


def _end(request: Request) -> int:
    """Where loading ends: vLLM computes the last token of the prompt itself, whose logits it needs.

    A request that was preempted has tokens of its answer behind the prompt: vLLM computes these again.
    """
    return min(request.num_prompt_tokens, request.num_tokens - 1)


def _digest(prompt: Prompt, settings: RequestSettings) -> bytes:
    """Identifies what is put together for a prompt: its ids, its chunks and the settings."""
    said = [[[s.start, s.end, s.chunk] for s in prompt.spans], settings.ratio, settings.selector, settings.tenant]
    # The ids apart, and not as text: a long prompt has ten thousands, and vLLM's loop waits for this.
    return hashlib.sha256(np.array(prompt.ids, np.int64).tobytes() + json.dumps(said).encode()).digest()
