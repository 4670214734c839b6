"""The scheduler's side of the connector: which requests reuse stored chunks, when their prompts are put together, and what
is reported of them.

Nothing here touches the model. vLLM calls it from the loop that plans each step, so every method is quick.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cachetune_rag.reuse.worth import stored_tokens
from cachetune_rag.text.recognising.id_spans import without_beginning
from cachetune_vllm.beam_search import is_beam
from cachetune_vllm.logs import logger
from cachetune_vllm.measured import Measured, usual
from cachetune_vllm.messages import FromWorker, Hello, Load, Missed, ToWorkers
from cachetune_vllm.metrics import ReuseStats
from cachetune_vllm.page_hashes import CachedPages, salt_hashes, salt_of
from cachetune_vllm.reasons import Left
from cachetune_vllm.recognition import Recognised
from cachetune_vllm.responses import nothing_reused
from cachetune_vllm.settings import REQUEST_KEY, RequestSettings, RequestSettingsError, ServerSettings
from cachetune_vllm.worthwhile import Verdict, Worthwhile

if TYPE_CHECKING:
    from vllm.v1.request import Request

_log = logger(__name__)

Recognise = Callable[[Sequence[int], RequestSettings], Recognised]
"""Finds a request's chunks in its token ids."""


@dataclass(eq=False)
class _Reusing:
    """A request that has stored chunks, from its arrival to its end.

    Attributes:
        request: vLLM's own object.
        found: its prompt, with the chunks that were found.
        settings: its settings.
        asked: whether the request gave settings, so that its response has a report whatever becomes of it.
        verdict: that it reuses its chunks, and by what that was decided; its pages have hashes of their own since. None: not decided yet.
        exact: how many of its first tokens are computed without reuse, so that their pages keep their hashes.
        hashes: the hashes of its prompt's pages before; none if some of these pages have reused rows whatever becomes of it.
        loading: whether its prompt is being put together.
        alone: whether vLLM computes the prompt in the end, because putting it together came to nothing.
        report: its report, once there is one.
    """

    request: Request
    found: Recognised
    settings: RequestSettings
    asked: bool
    verdict: Verdict | None = None
    exact: int = 0
    hashes: tuple[bytes, ...] = ()
    loading: bool = False
    alone: bool = False
    report: dict[str, Any] = field(default_factory=dict)


class ReuseScheduler:
    """Decides over the requests of one engine core. Not for several threads: vLLM calls it from one.

    Args:
        settings: the server's.
        hello: what the workers say of their model.
        block_size: tokens in a page of vLLM's cache.
        recognise: finds chunks in token ids; not called if the workers refuse their model.
        clock: gives seconds that only grow.

    Attributes:
        pages: which pages vLLM's prefix cache has.
        stats: what was counted since vLLM last asked.
    """

    def __init__(
        self,
        settings: ServerSettings,
        hello: Hello,
        block_size: int,
        recognise: Recognise,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._settings, self._hello, self._block_size, self._recognise = settings, hello, block_size, recognise
        self._measured = Measured(clock, hello.least_reused)
        self._worthwhile = Worthwhile(settings, hello, self._measured)
        if hello.refusal is None and (why := self._worthwhile.why_server_reuses_nothing) is not None:
            _log.warning("no chunks are reused for requests that give no ratio or selector of their own: %s", why)
        self.pages = CachedPages()
        self._requests: dict[str, _Reusing] = {}
        self._told: dict[str, dict[str, Any]] = {}  # reports for requests that gave settings, but are left to vLLM
        self._not_shown: dict[str, list[int]] = {}  # numbers of named texts, for the reports
        self._loads: list[Load] = []
        self._missed: list[Missed] = []
        self._given_up: set[str] = set()
        self._loading = 0
        self.stats = ReuseStats()

    def arrived(self, request: Request) -> None:
        """A request came: look for its chunks."""
        given = (request.kv_transfer_params or {}).get(REQUEST_KEY)
        asked = given is not None
        try:
            settings = RequestSettings.of(given, self._settings)
        except RequestSettingsError as error:
            # A server with the middleware has answered such a request with status 400 already.
            _log.warning("request %s: %s It is answered without reuse.", request.request_id, error)
            self._leave(request, Left.SETTINGS, asked, error=str(error))
            return
        reason = self._why_not(request, settings)
        if reason is not None:
            self._leave(request, reason, asked, why=self._why_so(request, reason))
            return
        if (why := self._worthwhile.why_all_recomputed(settings)) is not None:
            self._leave(request, Left.ALL_RECOMPUTED, asked, why=why)
            return
        assert request.prompt_token_ids is not None
        found = self._recognise(request.prompt_token_ids, settings)
        if found.cut_short:
            self.stats.add("cut_short")
        if found.not_shown:
            self._not_shown[request.request_id] = list(found.not_shown)
        if found.prompt is None:
            self._leave(request, Left.NOTHING_FOUND, asked)
            return
        self._requests[request.request_id] = _Reusing(request, found, settings, asked)

    def matched(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """How many tokens behind the first `computed` ones will be put together, and that this happens between steps.

        None where vLLM should ask again in its next step.
        """
        reusing = self._requests.get(request.request_id)
        if reusing is None or reusing.alone:
            return 0, False
        if reusing.verdict is None:
            if not self._reuses(reusing, computed):
                return 0, False
            if self.pages.has(request.block_hashes, computed // self._block_size):
                return None, False  # the same prompt was put together before: vLLM finds its pages by the new hashes
        assert reusing.found.prompt is not None
        # After an equal prompt, most pages may be in vLLM's cache. The rest is put together as well, however little it is: otherwise
        # vLLM would compute tokens that are to be reused, and the answer could differ from that to the equal prompt.
        if not stored_tokens(reusing.found.prompt, computed, reusing.found.missing):
            if not reusing.report:
                reused = stored_tokens(reusing.found.prompt, missing=reusing.found.missing)
                reusing.report = {"reused": reused, "left": Left.SAME_PROMPT.value}
            return 0, False
        if self._loading >= self._settings.loads_at_once:
            return None, False
        return _end(request) - computed, True

    def allocated(self, request: Request, blocks: Sequence[int], count: int) -> None:
        """Pages were given to a request; `count` of its tokens are to be put together there (0: none)."""
        if not count:
            return
        reusing = self._requests[request.request_id]
        settings, end, verdict = reusing.settings, _end(request), reusing.verdict
        assert reusing.found.prompt is not None
        assert verdict is not None
        # Behind an equal prompt, of which vLLM has found pages, the rest is put together however long it takes; see `matched`. So is a prompt that was put
        # together before, and lost its pages in the middle of its answer.
        first = end - count == verdict.cached
        if not first:
            reusing.hashes = ()
        self._loads.append(
            Load(
                request.request_id, reusing.found.prompt, settings.selector, settings.ratio, settings.tenant, tuple(blocks),
                end - count, end, min(reusing.exact, end - count), settings.explain, settings.max_kl, settings.min_top1,
                self._worthwhile.plain(count + 1) if first and not reusing.report else None,
            )
        )  # fmt: skip
        reusing.loading = True
        self._loading += 1
        savings = verdict.savings
        # Neither what makes an explanation is typical, nor a prompt of which vLLM has found more pages since.
        typical = not settings.explain and first
        self._measured.load_begins(
            request.request_id, verdict.kind, savings.stored, savings.to_compute, typical=typical
        )

    def to_workers(self, tokens: int) -> ToWorkers:
        """What the workers are told with a step in which vLLM computes so many tokens."""
        step = self._measured.step_begins(tokens) if tokens else None
        message = ToWorkers(tuple(self._loads), tuple(self._missed), frozenset(self._given_up), not tokens, step)
        self._loads, self._missed, self._given_up = [], [], set()
        return message

    def reported(self, told: FromWorker) -> None:
        """Take in what workers say of prompts and steps."""
        if told.step is not None:
            self._measured.step_ends(told.step)
        for request_id, report in told.reports.items():
            left = "left" in report
            if left:
                self.stats.add_left(report["left"], report)
            else:
                self.stats.add_report(report)
            reusing = self._requests.get(request_id)
            if reusing is not None:
                reusing.report = report
                # vLLM would ask for the same again, since none of it is computed yet.
                reusing.alone = left
                if left:
                    # vLLM computes all of its pages, so they are found as any others, and nobody takes them for pages with reused rows.
                    reusing.request.block_hashes[: len(reusing.hashes)] = reusing.hashes
                _count_cached(reusing.request, report["reused"])
        for request_id, storing in told.storing.items():
            self.stats.add_storing(storing)
            if request_id in self._told:
                self._told[request_id] |= storing

    def loaded(self, request_ids: Sequence[str] | set[str]) -> None:
        """Prompts are in vLLM's pages, or failed, or were given up: their place is free for others."""
        self._loading -= len(request_ids)
        for request_id in request_ids:
            reusing = self._requests.get(request_id)
            if reusing is not None:
                reusing.loading = False
            told = {} if reusing is None or reusing.alone else reusing.report
            self._measured.load_ends(request_id, told["reused"] if told and usual(told) else None)

    def take_stats(self) -> ReuseStats | None:
        """What was counted since the last call; None if nothing was."""
        if self.stats.is_empty():
            return None
        stats, self.stats = self.stats, ReuseStats()
        return stats

    def finished(self, request: Request) -> dict[str, Any] | None:
        """A request is over, in whatever way. Returns what its response says of reuse; None if there is nothing to say."""
        told = self._told.pop(request.request_id, None)
        not_shown = self._not_shown.pop(request.request_id, None)
        more = {} if not_shown is None else {"not_shown": not_shown}
        reusing = self._requests.pop(request.request_id, None)
        if reusing is None:
            return None if told is None else {REQUEST_KEY: told | more}
        if reusing.loading:
            self._given_up.add(request.request_id)
        if reusing.report.get("left") == Left.SAME_PROMPT:
            self.stats.add_left(Left.SAME_PROMPT)
        return {REQUEST_KEY: reusing.report | more} if reusing.report else None

    # -- decisions -----------------------------------------------------------------------------------------------

    def _why_not(self, request: Request, settings: RequestSettings) -> Left | None:
        """Why a request is left to vLLM before its chunks are looked for; None if it isn't."""
        if not settings.reuse:
            return Left.ASKED
        if self._hello.refusal is not None:
            return Left.REFUSED
        if (reason := why_not(request)) is not None:
            return reason
        most = self._hello.most_tokens
        return Left.MEMORY if most is not None and request.num_prompt_tokens > most else None

    def _why_so(self, request: Request, reason: Left) -> str | None:
        """What a response says about a reason of `_why_not`; None where the reason says it all."""
        if reason is Left.MEMORY:
            return (
                f"it has {request.num_prompt_tokens} tokens, and prompts of up to {self._hello.most_tokens} have room in the GPU's memory beside "
                "what vLLM takes."
            )
        return self._hello.refusal_told if reason is Left.REFUSED else None

    def _reuses(self, reusing: _Reusing, computed: int) -> bool:
        """Decide, once vLLM has looked for its first tokens in its prefix cache, whether a request reuses chunks behind those.

        vLLM finds a page by the hash of all tokens up to its end. A page with reused keys and values must not be found by requests
        that compute theirs, so from the first page with a token of a chunk on, the hashes also depend on the whole prompt and its
        settings: only the same prompt at the same settings finds such a page. The pages before it hold what vLLM would compute, and
        keep their hashes. The first `computed` tokens were found by such hashes, so they are exact, whatever chunks they are part of.
        """
        request, found, settings = reusing.request, reusing.found, reusing.settings
        assert found.prompt is not None
        verdict = self._worthwhile.weigh(found, settings, computed)
        if verdict.left is not None:
            del self._requests[request.request_id]
            self._leave(request, verdict.left, reusing.asked, found, settings, why=verdict.why)
            return False
        prompt = without_beginning(found.prompt, computed)
        reusing.found = Recognised(prompt, found.missing)
        first = max(computed, min(span.start for span in prompt.spans)) // self._block_size
        reusing.exact, reusing.verdict = first * self._block_size, verdict
        reusing.hashes = tuple(request.block_hashes)
        salt_hashes(request.block_hashes, first, salt_of(prompt, settings))
        return True

    def _leave(
        self,
        request: Request,
        reason: Left,
        asked: bool,
        found: Recognised | None = None,
        settings: RequestSettings | None = None,
        **said: str | None,
    ) -> None:
        """Leave a request to vLLM. Chunks that it names and the store lacks are stored meanwhile."""
        report = nothing_reused(reason)
        if found is not None and found.prompt is not None and found.missing:
            spans = [span for span in found.prompt.spans if span.chunk in found.missing]
            report["missed"] = sum(span.end - span.start for span in spans)
            if self._settings.store_missed and settings is not None:
                numbers = tuple(span.chunk for span in spans)
                self._missed.append(Missed(request.request_id, found.prompt, numbers, settings.tenant))
        self.stats.add_left(reason, report)
        if asked:
            self._told[request.request_id] = report | {name: text for name, text in said.items() if text}


def why_not(request: Request) -> Left | None:
    """Why a request can't reuse chunks: what it asks for needs keys, values or hidden states that only vLLM computes."""
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return Left.EMBEDDINGS
    if request.pooling_params is not None:
        return Left.POOLING
    if request.lora_request is not None:
        return Left.LORA
    if request.mm_features:
        return Left.IMAGES
    if request.resumable:
        return Left.STREAMED_INPUT
    if request.sampling_params is not None and request.sampling_params.prompt_logprobs is not None:
        return Left.PROMPT_LOGPROBS
    if request.skip_reading_prefix_cache:
        return Left.NO_PREFIX_CACHE
    # Put together once a token and beam, since what is recomputed depends on the whole prompt; vLLM finds all but one token in its cache.
    if is_beam(request):
        return Left.BEAM_SEARCH
    return None


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
