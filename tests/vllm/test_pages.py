"""What of vLLM's pages is read, and where it is put. Pages lie as vLLM's kernels for GPUs have them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cachetune_rag.model import KVBuffers
from cachetune_rag.reuse.prompt_room import PromptRoom
from cachetune_rag.text.recognising.id_spans import IdSpan, prompt_of_ids
from cachetune_store.layout import LayerSpec
from cachetune_vllm.messages import Load
from cachetune_vllm.pages import FEW_PAGES, PagedMemory, Pages

PAGE, PAGES, LAYERS, HEADS, DIM = 8, 12, 2, 2, 4
BLOCKS = [7, 2, 9, 3, 11, 5]
"""The pages of the request, in its order."""
LENGTH = len(BLOCKS) * PAGE


def write(attention: Any, keys: torch.Tensor, values: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
    """As vLLM's attention layers write rows: a token's values follow its keys."""
    for slot, key, value in zip(slots.tolist(), keys, values, strict=True):
        pages[slot // PAGE, :, slot % PAGE] = torch.cat((key, value), dim=-1)


def buffers(length: int) -> KVBuffers:
    made = KVBuffers([LayerSpec(HEADS, DIM, DIM)] * LAYERS, length, torch.float32, torch.device("cpu"))
    for rows in (*made.key_rows, *made.value_rows):
        rows.fill_(-1.0)
    return made


def filled_pages(least_read: int = 1) -> tuple[Pages, torch.Tensor]:
    """A request's pages, and the rows in them: [layers, 2, tokens, heads, dim]."""
    layers: Any = [
        SimpleNamespace(
            impl=SimpleNamespace(do_kv_cache_update=write), kv_cache=torch.zeros(PAGES, HEADS, PAGE, 2 * DIM)
        )
        for _ in range(LAYERS)
    ]
    pages = Pages(layers, PAGE, PAGES, least_read)
    assert pages.learn_to_read(buffers(PAGE))
    rows = torch.randn(LAYERS, 2, LENGTH, HEADS, DIM)
    slots = pages.slots(BLOCKS, 0, LENGTH, torch.device("cpu"))
    for layer in range(LAYERS):
        pages.write(layer, rows[layer, 0], rows[layer, 1], slots)
    return pages, rows


@pytest.mark.parametrize(
    ("start", "end"), [(0, PAGE), (3, 2 * PAGE), (PAGE - 1, PAGE + 1), (0, FEW_PAGES * PAGE + 1), (5, 6 * PAGE - 3)]
)
def test_rows_are_read_from_a_requests_pages_and_nothing_else_changes(start: int, end: int) -> None:
    pages, rows = filled_pages()
    found = buffers(LENGTH)
    pages.read(BLOCKS, start, end, found)
    for layer in range(LAYERS):
        for mine, wanted in zip((found.key_rows[layer], found.value_rows[layer]), rows[layer], strict=True):
            assert torch.equal(mine[start:end], wanted[start:end])
            assert (mine[:start] == -1).all()
            assert (mine[end:] == -1).all()


@pytest.mark.parametrize(
    "blocks", [BLOCKS[:2], [*BLOCKS[:2], PAGES], [*BLOCKS[:2], -1]], ids=["one page too few", "too large", "negative"]
)
def test_slots_outside_of_the_cache_are_refused(blocks: list[int]) -> None:
    """vLLM's kernels write wherever they are told to."""
    layers: Any = [SimpleNamespace(impl=SimpleNamespace(do_kv_cache_update=write), kv_cache=torch.zeros(PAGES, 1))]
    pages = Pages(layers, PAGE, PAGES)
    assert pages.slots(blocks, 0, 2 * PAGE, torch.device("cpu")).tolist()[-1] == BLOCKS[1] * PAGE + PAGE - 1
    with pytest.raises(RuntimeError, match=rf"tokens 3 to 17 .*pages 0 to {PAGES - 1}: nothing is written"):
        pages.slots(blocks, 3, 2 * PAGE + 1, torch.device("cpu"))
    rows, slots = torch.zeros(PAGE, HEADS, DIM), pages.slots(BLOCKS, 0, PAGE - 1, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=f"{PAGE} rows for {PAGE - 1} slots"):
        pages.write(0, rows, rows, slots)


@pytest.mark.parametrize(("exact", "kept"), [(0, 0), (PAGE, 0), (2 * PAGE, 2 * PAGE), (3 * PAGE, 3 * PAGE)])
def test_a_beginning_too_short_to_be_worth_reading_is_computed(exact: int, kept: int) -> None:
    pages, rows = filled_pages(least_read=2 * PAGE)
    pages.readable = True
    prompt = prompt_of_ids(range(LENGTH), [IdSpan(3 * PAGE, LENGTH - 1, "chunk")])
    load = Load("r", prompt, "frequency", 0.15, "", tuple(BLOCKS), exact, LENGTH - 1, exact)
    mine = buffers(LENGTH)
    inner: Any = SimpleNamespace(
        take=lambda ids, exact, answer_tokens, memory, await_layer: (mine, 0),
        bytes_for=lambda ids, answer_tokens: 64,
        layer_bytes=lambda ids, answer_tokens: [64],
    )
    memory = PagedMemory(inner, pages, load, PromptRoom(torch.device("cpu")))
    given, count = memory.take(prompt.ids_array, 3 * PAGE, 0)
    assert (given, count) == (mine, kept)
    for layer in range(LAYERS):
        for there, wanted in zip((mine.key_rows[layer], mine.value_rows[layer]), rows[layer], strict=True):
            assert torch.equal(there[:kept], wanted[:kept])
            assert (there[kept:] == -1).all()
