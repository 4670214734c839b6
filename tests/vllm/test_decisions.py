"""What the scheduler's side decides and counts, without a model: which requests are left to vLLM and why."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm import PoolingParams, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from cachetune_rag.reuse.worth import savings_of
from cachetune_rag.text.recognising.id_spans import IdSpan, prompt_of_ids
from cachetune_vllm import worthwhile
from cachetune_vllm.measured import TRIED
from cachetune_vllm.messages import FromWorker, Hello
from cachetune_vllm.metrics import ReuseMetrics
from cachetune_vllm.page_hashes import salt_hashes, salt_of
from cachetune_vllm.reasons import Left
from cachetune_vllm.recognition import Recognised
from cachetune_vllm.scheduler import ReuseScheduler
from cachetune_vllm.settings import RequestSettings, ServerSettings

PAGE = 16
GPU = Hello(None)


def found(length: int, *spans: tuple[int, int], missing: set[int] | None = None) -> Recognised:
    prompt = prompt_of_ids(range(length), [IdSpan(start, end, start) for start, end in spans])
    return Recognised(prompt, frozenset(missing or ()))


def scheduler(what: Recognised, hello: Hello = GPU, **settings: Any) -> ReuseScheduler:
    return ReuseScheduler(ServerSettings.of({"store": "kv", **settings}), hello, PAGE, lambda ids, asked: what)


def request(length: int, **asked: Any) -> Request:
    return request_of(length, asked)


def request_of(length: int, asked: dict[str, Any], **given: Any) -> Request:
    """A request as vLLM hands it over; `given` are its other properties."""
    extra = {"kv_transfer_params": {"cachetune": asked}}
    hashes = [number.to_bytes(32, "big") for number in range(length // PAGE)]
    values: dict[str, Any] = {
        "prompt_token_ids": list(range(length)),
        "sampling_params": SamplingParams(extra_args=extra),
        "pooling_params": None,
    }
    return Request("r", block_hasher=lambda _: list(hashes), **(values | given))


def left(
    what: Recognised, cached: int = 0, hello: Hello = GPU, asked: dict[str, Any] | None = None, **settings: Any
) -> Any:
    """The reason and the whole report of a request that is left to vLLM; its pages keep their hashes."""
    made = scheduler(what, hello, **settings)
    length = 64 if what.prompt is None else len(what.prompt.ids)
    one = request(length, **(asked or {}))
    before = list(one.block_hashes)
    made.arrived(one)
    if made.matched(one, cached) != (0, False):
        return None
    assert one.block_hashes == before
    report = (made.finished(one) or {})["cachetune"]
    assert made.stats.data[f"left:{report['left']}"] == 1
    return report


def test_texts_that_a_request_names_and_its_prompt_does_not_show_are_told() -> None:
    """Whether the others are reused or not; a client whose template changes its passages would get nothing stored, and no word of it."""
    for what in (found(8000, (100, 4000)), found(600, (100, 200)), Recognised(None)):
        made = scheduler(replace(what, not_shown=(0, 2)))
        one = request(8000 if what.prompt is None else len(what.prompt.ids), chunks=["a", "b", "c"])
        made.arrived(one)
        made.matched(one, 0)
        made.reported(FromWorker({"r": {"reused": 3900}} if made.matched(one, 0)[1] else {}))
        assert (made.finished(one) or {})["cachetune"]["not_shown"] == [0, 2]
    assert "not_shown" not in left(found(600, (100, 200)))


@pytest.mark.parametrize(
    ("what", "cached", "reason"),
    [
        (found(4000, (100, 3000)), 0, None),
        (found(2140, (20, 2068)), 0, None),  # 1,740 tokens would be spared
        (found(2140, (20, 2068)), 528, "cached"),  # 1,309
        (found(1100, (20, 1044)), 0, "few"),  # 870
        (found(8000, (100, 1900)), 0, "few"),  # 19% of the tokens
        (found(4000, (100, 3000)), 2000, "cached"),
        (found(4000, (100, 3000)), 96, None),
        (found(4000, (100, 3000), missing={0}), 0, "missed"),
        (found(4000, (100, 2000), (2000, 3000), missing={0}), 0, "few"),
    ],
)
def test_what_would_be_read_as_fast_is_left_to_vllm(what: Recognised, cached: int, reason: str | None) -> None:
    report = left(what, cached)
    assert (report and report["left"]) == reason


PICTURE = MultiModalFeatureSpec(
    data=None, modality="image", identifier="a picture", mm_position=PlaceholderRange(offset=5, length=20)
)
LOGPROBS = SamplingParams(prompt_logprobs=1, extra_args={"kv_transfer_params": {"cachetune": {}}})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"sampling_params": None, "pooling_params": PoolingParams()}, "pooling"),
        ({"prompt_token_ids": None, "prompt_embeds": torch.zeros(4000, 8)}, "embeddings"),
        ({"prompt_embeds": torch.zeros(4000, 8)}, "embeddings"),  # some of its tokens are given as ids as well
        ({"mm_features": [PICTURE]}, "images"),
        ({"lora_request": LoRARequest("style", 1, "/adapters/style")}, "lora"),
        ({"resumable": True}, "streamed input"),
        ({"sampling_params": LOGPROBS}, "prompt logprobs"),
    ],
)
def test_what_only_vllm_computes_is_passed_on_as_it_is_and_counted(given: dict[str, Any], reason: str) -> None:
    made = scheduler(found(4000, (100, 3900)))
    one = request_of(4000, {}, **given)
    before = list(one.block_hashes)
    made.arrived(one)
    assert made.matched(one, 0) == (0, False)
    assert one.block_hashes == before
    assert made.to_workers(64).loads == ()
    report = made.finished(one)
    # vLLM reads a request's settings from its sampling parameters, which a pooling request doesn't have.
    assert report == (None if reason == "pooling" else {"cachetune": {"reused": 0, "left": reason}})
    stats = made.take_stats()
    assert stats is not None
    assert stats.data == {f"left:{reason}": 1}


def test_an_operator_says_from_how_many_tokens_on_reuse_pays() -> None:
    assert left(found(8000, (100, 1900)), least_reused=1500) is None
    assert left(found(8000, (100, 1900)), least_reused=1600)["left"] == "few"
    assert "1530 tokens, and least_reused is 1600" in left(found(8000, (100, 1900)), least_reused=1600)["why"]


class Timed:
    """A scheduler whose clock is the test's, in a server that reads 40 tokens a millisecond beside 10 ms a step."""

    def __init__(self, what: Recognised, **settings: Any):
        self.now, self.what = 0.0, what
        self.made = ReuseScheduler(
            ServerSettings.of({"store": "kv", **settings}), GPU, PAGE, lambda ids, asked: self.what, lambda: self.now
        )

    def step(self, tokens: int, seconds: float, told: FromWorker | None = None) -> None:
        planned = self.made.to_workers(tokens)
        assert (planned.step is None) == planned.idle == (not tokens)
        self.now += seconds
        self.made.reported(replace(told or FromWorker(), step=planned.step))

    def reads(self) -> Timed:
        """It has answered requests without reuse."""
        for tokens in (1, 512, 2048) * 3:
            self.step(tokens, 0.01 + tokens / 40_000)
        return self

    def reuses(self, seconds: float, cached: int = 0, **told: Any) -> Timed:
        """A request that reuses takes so long to be put together, which takes vLLM some empty steps."""
        one = request(4000)
        self.made.arrived(one)
        assert self.made.matched(one, cached) == (3999 - cached, True)
        self.made.allocated(one, range(250), 3999 - cached)
        self.step(0, seconds / 2)
        self.step(0, seconds / 2, FromWorker({"r": {"reused": 3230, "bytes_read": {"host": 1}} | told}))
        self.made.loaded({"r"})
        self.step(1, 0.01)
        self.made.finished(one)
        return self

    def decides(self, cached: int = 0) -> Any:
        """Why the next request is left to vLLM; None if it reuses."""
        one = request(4000)
        self.made.arrived(one)
        if self.made.matched(one, cached) != (0, False):
            return None
        return (self.made.finished(one) or {})["cachetune"]


CHUNK = (100, 3900)
"""What a prompt of 4,000 tokens has of a stored chunk: 3,230 of it are spared at a ratio of 0.15, and vLLM reads the prompt in 120 ms."""


@pytest.mark.parametrize(
    ("took", "left"), [(0.05, False), (0.09, False), (0.12, True), (0.3, True)], ids=lambda each: str(each)
)
def test_what_a_server_has_measured_of_itself_decides(took: float, left: bool) -> None:
    server = Timed(found(4000, CHUNK)).reads()
    for _ in range(3):
        assert server.decides() is None  # nothing is known: enough tokens would be spared
        server.reuses(took)
    report = server.decides()
    assert (report is not None) == left
    if left:
        assert report["left"] == "few"
        assert report["why"] == (
            f"reuse would take {1000 * took + 10:.0f} ms and vLLM 120 ms, by what this server took lately"
        )


@pytest.mark.parametrize(
    "told",
    [
        {"bytes_read": {"host": 5, "disk": 7}},
        {"bytes_read": {"remote": 7}},
        {"damaged": 1},
        {"missed": 5},
        {"timed_out": 1},
    ],
    ids=str,
)
def test_what_was_slow_for_its_own_reasons_says_nothing_of_the_next_request(told: dict[str, Any]) -> None:
    """Chunks that were read from a disk are in memory then: without that, three of them would switch reuse off."""
    server = Timed(found(4000, CHUNK)).reads()
    for _ in range(9):
        server.reuses(5.0, **told)
    assert server.decides() is None
    for _ in range(3):
        server.reuses(0.05, bytes_read={"host": 5, "disk": 0})
    assert server.decides() is None


def test_reuse_that_was_slow_is_tried_again_and_so_comes_back() -> None:
    server = Timed(found(4000, CHUNK)).reads()
    for _ in range(3):
        server.reuses(0.3)
    for _ in range(4):
        assert [server.decides() is None for _ in range(TRIED - 1)] == [False] * (TRIED - 1)
        server.reuses(0.05)  # the next one of them
    assert [server.decides() is None for _ in range(TRIED)] == [True] * TRIED


def test_what_vllm_has_cached_makes_it_quicker_than_reuse() -> None:
    server = Timed(found(4000, CHUNK)).reads()
    for _ in range(3):
        server.reuses(0.06)
    assert server.decides() is None
    assert server.decides(cached=2000)["left"] == "cached"


def test_shorter_prompts_reuse_where_that_was_measured_to_be_quick() -> None:
    server = Timed(found(4000, CHUNK)).reads()
    short = found(1100, (20, 1044))  # 870 tokens would be spared: too few for what is taken without measurements
    server.what = short
    assert server.decides()["left"] == "few"
    server.what = found(4000, CHUNK)
    for _ in range(3):
        server.reuses(0.03)
    server.what = short
    assert server.decides() is None


@pytest.mark.parametrize(
    ("what", "asked_with", "reason", "weighed"),
    [
        (found(1100, (20, 1044)), [0], "few", [0]),
        (found(4000, CHUNK, missing={0}), [2000], "missed", [2000]),
        (
            found(4000, CHUNK),
            [2000],
            "cached",
            [2000, 0],
        ),  # because of the cache? Without it, its chunks would be reused
        (found(4000, CHUNK), [0], "few", [0]),  # by what was measured
        (found(8000, (100, 7900)), [0, 0, 32, 0], None, [0]),  # vLLM asks again as long as the request waits
    ],
    ids=str,
)
def test_a_request_is_weighed_once(
    what: Recognised, asked_with: list[int], reason: str | None, weighed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Timed(found(4000, CHUNK)).reads()
    for _ in range(3):
        server.reuses(0.3 if reason == "few" else 0.06)
    server.what, seen = what, []

    def counted(prompt: Any, ratio: float, **given: Any) -> Any:
        seen.append(given["cached"])
        return savings_of(prompt, ratio, **given)

    monkeypatch.setattr(worthwhile, "savings_of", counted)
    assert what.prompt is not None
    one = request(len(what.prompt.ids))
    server.made.arrived(one)
    for cached in asked_with:
        assert server.made.matched(one, cached)[1] == (reason is None)
    assert seen == weighed
    if reason is None:
        server.made.allocated(one, range(500), 7999)
    else:
        assert (server.made.finished(one) or {})["cachetune"]["left"] == reason
    assert seen == weighed


@pytest.mark.parametrize(("measures", "settings"), [(True, {}), (False, {}), (True, {"least_reused": 100})], ids=str)
def test_workers_are_told_how_long_vllm_takes_so_that_they_leave_what_a_disk_gives_more_slowly(
    measures: bool, settings: dict[str, Any]
) -> None:
    server = Timed(found(4000, CHUNK), **settings)
    if measures:
        server.reads()
    one = request(4000)
    before = list(one.block_hashes)
    server.made.arrived(one)
    assert server.made.matched(one, 48) == (3951, True)
    assert one.block_hashes != before
    server.made.allocated(one, range(250), 3951)
    plain = server.made.to_workers(0).loads[0].plain
    if not measures or settings:  # nothing is known, or the operator's number decides alone
        assert plain is None
        return
    assert plain == pytest.approx(3952 * (0.01 + 2048 / 40_000) / 2048)
    said = {"reused": 0, "left": Left.SLOW_DISK.value, "why": "slow"}
    server.made.reported(FromWorker({"r": said}))
    server.made.loaded({"r"})
    assert server.made.matched(one, 48) == (0, False)  # vLLM computes it
    assert one.block_hashes == before  # and an equal prompt finds pages that are vLLM's own
    stats = server.made.take_stats()
    assert stats is not None
    assert stats.data["left:slow disk"] == 1
    assert server.made.finished(one) == {"cachetune": said}


def test_the_rest_of_an_equal_prompt_is_put_together_whatever_disk_it_lies_on() -> None:
    """Its other pages have reused rows: a report that says nothing was reused would be wrong, and the answer another one."""
    server = Timed(found(4000, CHUNK)).reads()
    known: set[bytes] = set()
    server.made.pages.bind(SimpleNamespace(get_cached_block=lambda hashed, groups: hashed in known or None))
    one = request(4000)
    server.made.arrived(one)
    assert server.made.matched(one, 0) == (3999, True)
    known |= set(one.block_hashes)
    server.made.finished(one)
    second = request(4000)
    server.made.arrived(second)
    assert server.made.matched(second, 0) == (None, False)
    assert server.made.matched(second, 2000) == (1999, True)
    server.made.allocated(second, range(250), 1999)
    assert server.made.to_workers(0).loads[0].plain is None
    server.made.reported(FromWorker({"r": {"reused": 0, "left": Left.FAILED.value}}))
    assert second.block_hashes == one.block_hashes  # its first pages have reused rows


def test_a_prompt_that_lost_its_pages_in_the_middle_of_its_answer_is_put_together_again() -> None:
    server = Timed(found(4000, CHUNK)).reads()
    one = request(4000)
    server.made.arrived(one)
    for expected in (True, False):
        assert server.made.matched(one, 0) == (3999, True)
        server.made.allocated(one, range(250), 3999)
        assert (server.made.to_workers(0).loads[0].plain is not None) == expected
        server.made.reported(FromWorker({"r": {"reused": 3230}}))
        server.made.loaded({"r"})


def test_an_operators_number_of_tokens_decides_alone_whatever_was_measured() -> None:
    server = Timed(found(4000, CHUNK), least_reused=100).reads()
    for _ in range(5):
        server.reuses(3.0)
    assert server.decides() is None


def test_a_prompt_that_memory_has_no_room_for_is_left_to_vllm() -> None:
    hello = Hello(None, least_reused=1024, most_tokens=3999)
    assert left(found(3999, (100, 3000)), hello=hello) is None
    report = left(found(4000, (100, 3000)), hello=hello)
    assert report["left"] == "memory"
    assert "it has 4000 tokens, and prompts of up to 3999 have room" in report["why"]


def test_a_cpu_reuses_shorter_prompts() -> None:
    assert left(found(600, (100, 500)))["left"] == "few"
    assert left(found(600, (100, 500)), hello=Hello(None, least_reused=256)) is None


@pytest.mark.parametrize(
    ("asked", "reason"), [({}, "refused"), ({"reuse": False}, "asked"), ({"ratio": 3}, "settings")]
)
def test_a_server_that_refuses_its_model_says_so(asked: dict[str, Any], reason: str) -> None:
    hello = Hello(None, refusal="its model is odd, see /files.", refusal_told="its model is odd.")
    report = left(Recognised(None), hello=hello, asked=asked)
    assert report["left"] == reason
    if reason == "refused":
        assert report["why"] == "its model is odd."


CALIBRATED = Hello(None, ratios={"expected_error": 1.0, "frequency": 0.1, "probe": 0.9})


@pytest.mark.parametrize(
    ("settings", "asked", "reason", "why"),
    [
        ({}, {}, "all recomputed", "calibrated for selector expected_error is 1"),
        ({}, {"selector": "expected_error"}, "all recomputed", "calibrated for selector expected_error is 1"),
        ({}, {"selector": "frequency"}, None, None),
        ({}, {"selector": "probe"}, "few", "would spare 380 tokens"),
        ({}, {"selector": "expected_error_early"}, None, None),  # nothing is calibrated for it
        ({}, {"ratio": 0.1}, None, None),
        ({}, {"ratio": 1}, "all recomputed", "the ratio is 1"),
        ({}, {"selector": "all"}, "all recomputed", "selector all recomputes all tokens"),
        ({}, {"max_kl": 0.05}, None, None),
        ({"selector": "frequency"}, {}, None, None),
        ({"tenant_from_request": True}, {"tenant": "another"}, None, None),  # has calibrations of its own
        ({"tenant": "own", "tenant_from_request": True}, {"tenant": "own"}, "all recomputed", "is 1"),
    ],
    ids=str,
)
def test_what_was_calibrated_counts_for_its_selector_and_tenant(
    settings: dict[str, Any], asked: dict[str, Any], reason: str | None, why: str | None
) -> None:
    report = left(found(4000, (100, 3900)), hello=CALIBRATED, asked=asked, **settings)
    assert (report and report["left"]) == reason
    if why is not None:
        assert why in report["why"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "cachetune calibrate"),
        ({"ratio": 1}, "use a smaller one"),
        ({"selector": "all"}, "use another one"),
        ({"selector": "frequency"}, None),
        ({"ratio": 0.2}, None),
        ({"max_kl": 0.05}, None),
    ],
    ids=str,
)
def test_a_server_that_reuses_nothing_by_itself_says_so_when_it_starts(
    settings: dict[str, Any], said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        scheduler(Recognised(None), CALIBRATED, **settings)
    lines = [record.getMessage() for record in caplog.records if "no chunks are reused" in record.getMessage()]
    assert len(lines) == (said is not None)
    assert said is None or said in lines[0]


def test_hashes_change_behind_what_is_exact() -> None:
    for cached, first in ((0, 6), (32, 6), (128, 8)):
        made, one = scheduler(found(4000, (100, 3900))), request(4000)
        before = list(one.block_hashes)
        made.arrived(one)
        assert made.matched(one, cached) == (3999 - cached, True)
        changed = [a != b for a, b in zip(before, one.block_hashes, strict=True)]
        assert changed == [False] * first + [True] * (len(changed) - first)
        assert len(set(one.block_hashes)) == len(one.block_hashes)
        made.allocated(one, range(250), 3999 - cached)
        (load,) = made.to_workers(64).loads
        assert (load.start, load.exact) == (cached, cached)
        assert load.prompt.spans[0].start == max(100, cached)


def test_no_page_behind_what_is_exact_has_the_hash_of_another_request() -> None:
    prompt = found(4000, (100, 3900)).prompt
    assert prompt is not None
    other_end = replace(prompt, ids=(*prompt.ids[:-1], 5))
    settings = ServerSettings.of({"store": "kv"})
    plain = RequestSettings.of({}, settings)
    hashes = [number.to_bytes(32, "big") for number in range(250)]
    of_another_user = [hashed[::-1] for hashed in hashes]  # vLLM's `cache_salt` changes all of a request's hashes
    made = []
    for theirs, which, asked in (
        (hashes, prompt, plain),
        (hashes, other_end, plain),
        (hashes, prompt, RequestSettings.of({"ratio": 0.3}, settings)),
        (hashes, prompt, RequestSettings.of({"selector": "frequency"}, settings)),
        (of_another_user, prompt, plain),
    ):
        mine = list(theirs)
        salt_hashes(mine, 6, salt_of(which, asked))
        assert mine[:6] == theirs[:6]
        assert len(mine) == len(theirs)
        made.append(mine)
        again = list(theirs)
        salt_hashes(again, 6, salt_of(replace(which), asked))
        assert again == mine
    behind = [hashed for mine in made for hashed in mine[6:]]
    assert len({*hashes, *behind}) == len(hashes) + len(behind)
    salt_hashes(made[0], len(made[0]), salt_of(prompt, plain))  # no page behind what is exact
    assert made[0][6:] == behind[: len(hashes) - 6]


def test_pages_of_an_answer_have_hashes_of_their_own_behind_those_of_the_same_prompt() -> None:
    """A request that is preempted during its answer looks for the answer's pages as well."""
    init_none_hash(sha256)
    made = []
    for token in (7, 8):
        sampling = SamplingParams(extra_args={"kv_transfer_params": {"cachetune": {}}})
        one = Request("r", list(range(4000)), sampling, None, block_hasher=get_request_block_hasher(PAGE, sha256))
        chosen = scheduler(found(4000, (100, 3900)))
        chosen.arrived(one)
        assert chosen.matched(one, 0) == (3999, True)
        one.append_output_token_ids([token] * PAGE)
        made.append(list(one.block_hashes))
    assert len(made[0]) == len(made[1]) == 251
    assert made[0][:250] == made[1][:250]
    assert made[0][250] != made[1][250]


def test_pages_of_the_same_prompt_are_looked_for_by_the_new_hashes() -> None:
    known: set[bytes] = set()
    made, one = scheduler(found(4000, (0, 3900))), request(4000)
    made.pages.bind(SimpleNamespace(get_cached_block=lambda hashed, groups: hashed in known or None))
    made.arrived(one)
    assert made.matched(one, 0) == (3999, True)
    known |= set(one.block_hashes)
    second = request(4000)
    made.finished(one)
    made.arrived(second)
    assert made.matched(second, 0) == (None, False)
    assert second.block_hashes == one.block_hashes
    assert made.matched(second, 3984) == (0, False)
    assert made.finished(second) == {"cachetune": {"reused": 3900, "left": "same prompt"}}


def test_missed_chunks_are_handed_to_the_worker_and_told_in_the_report() -> None:
    made, one = scheduler(found(4000, (100, 2000), (2000, 2300), missing={0, 1})), request(4000)
    made.arrived(one)
    made.matched(one, 0)
    (missed,) = made.to_workers(64).missed
    assert (missed.chunks, missed.tenant) == ((0, 1), "")
    made.reported(FromWorker(storing={"r": {"storing": 1, "unstored": 1}}))
    report = (made.finished(one) or {})["cachetune"]
    assert (report["left"], report["missed"], report["storing"], report["unstored"]) == ("missed", 2200, 1, 1)
    assert {name: made.stats.data[name] for name in ("missed", "storing", "unstored")} == {
        "missed": 2200, "storing": 1, "unstored": 1,
    }  # fmt: skip


def test_nothing_is_stored_where_the_operator_does_not_want_it() -> None:
    made, one = scheduler(found(4000, (100, 2000), missing={0}), store_missed=False), request(4000)
    made.arrived(one)
    made.matched(one, 0)
    assert made.to_workers(64).missed == ()


def test_metrics_have_every_count() -> None:
    registry = CollectorRegistry()

    def kind(cls: Any) -> Any:
        return lambda **given: cls(**given, registry=registry)

    types = {Counter: kind(Counter), Gauge: kind(Gauge), Histogram: kind(Histogram)}
    config = SimpleNamespace(kv_transfer_config=None)
    metrics = ReuseMetrics(config, types, ["engine"], {0: ["0"]})  # type: ignore[arg-type]
    made = scheduler(Recognised(None, cut_short=True))
    made.arrived(request(64))
    made.reported(FromWorker({"gone": {"reused": 0, "left": Left.FAILED.value, "damaged": 2, "missed": 7}}))
    stats = made.take_stats()
    assert stats is not None
    metrics.observe(stats.data)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"cachetune_vllm_{name}_total", {"engine": "0", **labels})

    assert value("prompts_cut_short") == 1
    assert value("requests_left", reason="nothing found") == value("requests_left", reason="failed") == 1
    assert (value("chunks", kind="damaged"), value("chunk_tokens", kind="missed")) == (2, 7)
