"""Chunks found in a prompt's token ids, whose first and last tokens the prompt has in another form or not at all.

The reference is transformers' own forward over the whole prompt with a cache that shows, at the places of reused tokens, the keys
and values that the model itself caches for the chunk behind its lead-in.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import BOS, VOCAB, Family, family, model_of, random_ids
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from cachetune_rag.chunks.lead_ins import LeadIns
from cachetune_rag.chunks.mean_capture import MeanCapture
from cachetune_rag.concurrency.deadline import DeadlinePool
from cachetune_rag.concurrency.model_lock import ModelLock
from cachetune_rag.errors import PromptError
from cachetune_rag.model import ModelAdapter
from cachetune_rag.reuse.config import ReuseConfig
from cachetune_rag.reuse.prefill import Assembler
from cachetune_rag.reuse.state import PrefillState
from cachetune_rag.selection import selector_names
from cachetune_rag.selection.frequency import frequency_scores
from cachetune_rag.text.prompts.prompt import Prompt
from cachetune_rag.text.recognising.id_spans import IdSpan, prompt_of_ids
from cachetune_store import ChunkStore, Namespace, make_key

SIZE = 30
MOVED = 3
CHUNKS = [random_ids(SIZE, seed) for seed in (11, 12, 13)]
OTHER = random_ids(40, seed=14)
NAMESPACE = Namespace("model", "tokenizer", "float32", ((BOS,),))


class Reuse:
    """An assembler over a store in memory."""

    def __init__(self, name: str, stored: Sequence[list[int]], device: str, cuda_kernels: bool):
        self.family: Family = family(name)
        self.model: PreTrainedModel = model_of(name) if device == "cpu" else self.family.build().to(device)
        self.adapter = ModelAdapter(self.model, cuda_kernels=cuda_kernels)
        self.store, self.pool = ChunkStore(None), DeadlinePool(None)
        lead_ins = LeadIns(self.store, NAMESPACE, choose=False, vocabulary=VOCAB, limit=None)
        self.assembler = Assembler(self.adapter, self.store, lead_ins, self.pool)
        for ids in stored:
            (kv,) = MeanCapture(self.adapter, ModelLock()).capture([tuple(ids)], NAMESPACE.lead_ins, None)
            key, scores = make_key(NAMESPACE, ids), frequency_scores(kv.layers)
            self.store.put(key, kv.layers, scores, namespace=NAMESPACE, token_ids=ids)

    def __call__(self, prompt: Prompt, ratio: float, selector: str = "frequency", skipped: float = 0.0) -> PrefillState:
        return self.assembler.prefill(prompt, ReuseConfig(selector, ratio, skipped), time.perf_counter())

    def assert_close(self, state: PrefillState, wanted: Tensor, times: int = 1) -> None:
        assert torch.isfinite(state.logits).all()
        assert (state.logits - wanted).abs().max().item() <= times * self.family.tolerance

    def assert_reused(self, state: PrefillState) -> None:
        """All of the chunks is reused. The model's own logits at moved positions differ by more than the tolerance already."""
        self.assert_close(state, self.reference(state.prompt), times=5)

    @torch.no_grad()
    def reference(self, prompt: Prompt) -> Tensor:
        """Logits behind the prompt, where every token of its spans is reused, but for the prompt's last token.

        All positions are moved up by `MOVED`, so that the lead-in of a chunk has one even where the prompt begins with the chunk:
        only distances count.
        """
        rows = _Stored(len(prompt.ids) - 1)
        for span in prompt.spans:
            chunk, start = prompt.chunk_ids[span.chunk], MOVED + span.start - span.first - 1
            cache = self._run([BOS, *chunk], DynamicCache(), start)[1]
            rows.put(cache, span.start, range(span.first + 1, span.first + 1 + span.end - span.start))
        return self._run(prompt.ids, rows, MOVED)[0]

    def full(self, prompt: Prompt) -> Tensor:
        return self._run(prompt.ids, DynamicCache(), 0)[0]

    @torch.no_grad()
    def _run(self, ids: Sequence[int], cache: DynamicCache, start: int) -> tuple[Tensor, DynamicCache]:
        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        positions = torch.arange(start, start + len(ids))[None]
        out = self.model(input_ids=torch.tensor([list(ids)]), position_ids=positions, use_cache=True, **{name: cache})
        return out.logits[:, -1], cache


class _Stored(DynamicCache):
    """Shows other keys and values than the model's at some places before `last`."""

    def __init__(self, last: int):
        super().__init__()
        self.last = last
        self.rows: list[tuple[DynamicCache, int, range]] = []

    def put(self, cache: DynamicCache, start: int, tokens: range) -> None:
        self.rows.append((cache, start, tokens))

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = (states.clone() for states in super().update(*args, **kwargs))
        layer = kwargs["layer_idx"] if "layer_idx" in kwargs else args[2]
        for cache, start, tokens in self.rows:
            kept = tokens[: max(0, self.last - start)]
            for mine, theirs in ((keys, cache.layers[layer].keys), (values, cache.layers[layer].values)):
                mine[:, :, start : start + len(kept)] = theirs[:, :, list(kept)]
        return keys, values


@contextmanager
def reuse_of(
    name: str, stored: Sequence[list[int]] = CHUNKS, device: str = "cpu", cuda_kernels: bool = False
) -> Iterator[Reuse]:
    made = Reuse(name, stored, device, cuda_kernels)
    try:
        yield made
    finally:
        made.pool.close()
        made.store.close()


@pytest.fixture(scope="module")
def llama() -> Iterator[Reuse]:
    with reuse_of("llama") as made:
        yield made


def prompt_of(*parts: list[int] | tuple[list[int], int, int]) -> Prompt:
    """Parts are tokens of no chunk, or (a chunk, how many of its first tokens are left out, how many of its last)."""
    ids: list[int] = []
    spans = []
    for part in parts:
        if isinstance(part, list):
            ids += part
            continue
        chunk, head, tail = part
        inside = chunk[head : len(chunk) - tail]
        spans.append(
            IdSpan(
                len(ids), len(ids) + len(inside), tuple(chunk), tuple(chunk[:head]), tuple(chunk[len(chunk) - tail :])
            )
        )
        ids += inside
    return prompt_of_ids(ids, spans)


A, B, C = CHUNKS
PROMPTS = {
    "two tokens differ at each edge": prompt_of([BOS, *OTHER[:6]], (A, 2, 2), OTHER[6:12], (B, 1, 0), OTHER[12:20]),
    "other counts of tokens": prompt_of([BOS, *OTHER[:3]], (A, 2, 1), OTHER[3:4], (B, 1, 2), OTHER[4:14]),
    "edges left out between neighbours": prompt_of([BOS], (A, 0, 2), (B, 2, 2), (C, 2, 0), OTHER[:9]),
    "edges that would overlap": prompt_of([BOS, 5], (A, 1, 2), [7], (B, 2, 1), OTHER[:9]),
    "the same chunk twice": prompt_of([BOS], (A, 1, 1), OTHER[:2], (A, 0, 2), OTHER[2:8]),
    "at the very beginning": prompt_of((A, 2, 0), OTHER[:5], (B, 0, 1), OTHER[5:9]),
    "at the very end": prompt_of([BOS, *OTHER[:5]], (A, 1, 1), OTHER[5:8], (B, 1, 2)),
    "nothing but chunks": prompt_of((A, 2, 2), (B, 2, 2)),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_tokens_at_edges_are_computed_and_all_others_reused(llama: Reuse, name: str) -> None:
    prompt = PROMPTS[name]
    state = llama(prompt, 0.0)
    llama.assert_reused(state)
    inside = sum(span.end - span.start for span in prompt.spans)
    ends_in_chunk = prompt.spans[-1].end == len(prompt.ids)
    assert state.report.reused == inside - ends_in_chunk
    assert (state.report.recomputed, state.report.missed) == (int(ends_in_chunk), 0)
    assert state.report.skipped == 0, (
        "tokens that the prompt doesn't have are not recomputed, whether their rows are read or not"
    )


@pytest.mark.parametrize("name", PROMPTS)
def test_recomputing_everything_is_full_prefill(llama: Reuse, name: str) -> None:
    prompt = PROMPTS[name]
    state = llama(prompt, 1.0)
    llama.assert_close(state, llama.full(prompt))
    assert state.report.recomputed == sum(span.end - span.start for span in prompt.spans)
    assert state.report.reused == 0


@pytest.mark.parametrize(
    "name", ["mistral", "qwen3", "gemma2", "gemma3", "phi3", "gpt-neox", "mixtral", "smollm3", "cohere2"]
)
def test_every_family(name: str) -> None:
    with reuse_of(name) as reuse:
        for which in ("two tokens differ at each edge", "edges left out between neighbours", "at the very end"):
            prompt = PROMPTS[which]
            reuse.assert_reused(reuse(prompt, 0.0))
            reuse.assert_close(reuse(prompt, 1.0), reuse.full(prompt))


@pytest.mark.parametrize("selector", selector_names())
@pytest.mark.parametrize("name", ["two tokens differ at each edge", "at the very end"])
def test_no_selector_chooses_or_counts_a_token_that_the_prompt_does_not_have(
    llama: Reuse, selector: str, name: str
) -> None:
    prompt = PROMPTS[name]
    for ratio, skipped in ((0.3, 0.0), (0.3, 0.2), (1.0, 0.5)):
        state = llama(prompt, ratio, selector, skipped)
        assert torch.isfinite(state.logits).all()
        assert state.report.reused + state.report.recomputed == sum(s.end - s.start for s in prompt.spans)
        assert state.report.skipped <= state.report.recomputed
    if selector != "none":
        llama.assert_close(state, llama.full(prompt))


def test_chunks_that_are_not_stored_count_with_the_tokens_that_the_prompt_has() -> None:
    prompt = PROMPTS["two tokens differ at each edge"]
    with reuse_of("llama", stored=[B]) as reuse:
        state = reuse(prompt, 0.0)
        assert (state.report.missed, state.report.reused) == (SIZE - 4, SIZE - 1)
        assert state.missed == (0,)


@pytest.mark.parametrize("spans", [[(0, 5), (4, 9)], [(5, 9), (0, 4)], [(3, 3)], [(8, 12)], [(-1, 3)]])
def test_spans_that_can_not_be_are_refused(spans: list[tuple[int, int]]) -> None:
    with pytest.raises(PromptError, match=r"prompt of 10 tokens.*in order"):
        prompt_of_ids(range(10), [IdSpan(start, end, start) for start, end in spans])


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_kernels", [False, True], ids=["plain", "kernels"])
def test_on_a_gpu(llama: Reuse, cuda_kernels: bool) -> None:
    """As on the CPU, at every ratio and with a selector that looks: the same tokens are computed over the same rows."""
    torch.backends.cuda.matmul.allow_tf32 = False
    with reuse_of("llama", device="cuda", cuda_kernels=cuda_kernels) as reuse:
        for prompt in PROMPTS.values():
            for ratio, selector in (
                (0.0, "frequency"),
                (0.3, "frequency"),
                (0.3, "expected_error"),
                (1.0, "frequency"),
            ):
                wanted, state = llama(prompt, ratio, selector), reuse(prompt, ratio, selector)
                assert (state.logits.cpu() - wanted.logits).abs().max().item() <= 1e-3
                assert state.report.reused == wanted.report.reused
