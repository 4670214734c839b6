"""What the two sides of the connector tell each other: the scheduler's process, and the workers that hold the model.

vLLM carries these through its own channels (between processes they are pickled), so they hold plain values only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from cachetune_rag.reuse.worth import LEAST_REUSED
from cachetune_rag.text.prompts.segments import Prompt
from cachetune_store import Namespace


@dataclass(frozen=True)
class Hello(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler once, when the server starts.

    Attributes:
        namespace: what the keys of its model's chunks are made with, before lead-ins were chosen.
        choose_lead_ins: whether lead-ins that are chosen later replace those of `namespace`.
        separator_ids: token ids of what stands between the chunks of a prompt.
        vocabulary: token ids are below this.
        max_positions: the most tokens that the model reads; None: no limit.
        most_tokens: the longest prompt that can be put together in the memory that vLLM leaves free; None: no bound.
        ratios: what a ratio of "auto" stands for, for requests of the server's own tenant, by selector: what was calibrated for it, for example. A selector
            that isn't in it has the usual ratio.
        least_reused: prompts for which reuse would save fewer tokens are read as fast without it on the worker's device.
        process: number of the worker's process, if it computes on cores that the scheduler's process runs on; None if it doesn't.
        refusal: why nothing is reused, for the server's log; None if prompts are.
        refusal_told: the same, for whoever sends requests.
    """

    namespace: Namespace | None
    choose_lead_ins: bool = True
    separator_ids: tuple[int, ...] = ()
    vocabulary: int = 0
    max_positions: int | None = None
    most_tokens: int | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    least_reused: int = LEAST_REUSED
    process: int | None = None
    refusal: str | None = None
    refusal_told: str | None = None


@dataclass(frozen=True)
class Load:
    """A prompt whose keys and values a worker puts together in vLLM's pages.

    Attributes:
        request_id: vLLM's name of the request.
        prompt: the prompt, with its chunks.
        selector, ratio, max_kl, min_top1: how much is recomputed, as the request or the server's settings say it.
        tenant: whose chunks may be used.
        blocks: numbers of the request's pages, in order.
        start, end: the tokens [start, end) are written; those before `start` are in vLLM's cache already.
        exact: so many of the first tokens are in vLLM's cache as vLLM computes them, without reuse.
        explain: whether the report says what became of every token and chunk.
        plain: seconds in which vLLM is expected to read what is put together; None: not known, or not to be asked.
    """

    request_id: str
    prompt: Prompt
    selector: str
    ratio: float | str
    tenant: str
    blocks: tuple[int, ...]
    start: int
    end: int
    exact: int = 0
    explain: bool = False
    max_kl: float | None = None
    min_top1: float | None = None
    plain: float | None = None


@dataclass(frozen=True)
class Missed:
    """Chunks that a request names and the store lacks, while the request is left to vLLM: they are stored when there is time.

    Attributes:
        request_id: vLLM's name of the request.
        prompt: the prompt, with its chunks.
        chunks: numbers of the missed ones.
        tenant: whose chunks they become.
    """

    request_id: str
    prompt: Prompt
    chunks: tuple[int, ...]
    tenant: str


@dataclass(frozen=True)
class ToWorkers(KVConnectorMetadata):
    """Sent with every step.

    Attributes:
        loads: prompts to put together from now on.
        missed: chunks to store.
        given_up: requests that ended while their prompt was being put together.
        idle: vLLM has nothing to compute in this step.
        step: the number of a step that is timed; None where it isn't.
    """

    loads: tuple[Load, ...] = ()
    missed: tuple[Missed, ...] = ()
    given_up: frozenset[str] = frozenset()
    idle: bool = False
    step: int | None = None


@dataclass
class FromWorker(KVConnectorWorkerMetadata):
    """What workers have done since the last step.

    Attributes:
        reports: of the prompts that were put together, or left alone: by request id, fields that fit into JSON.
        storing: of the requests in `ToWorkers.missed`: by request id, how many chunks will be stored, and how many not.
        step: the number of the step whose outcome this comes with.
    """

    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    storing: dict[str, dict[str, int]] = field(default_factory=dict)
    step: int | None = None

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Keep one report a prompt, the first worker's: workers that share a model's heads put the same prompts together."""
        assert isinstance(other, FromWorker)
        step = other.step if self.step is None else self.step
        return FromWorker({**other.reports, **self.reports}, {**other.storing, **self.storing}, step)
