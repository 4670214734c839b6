"""One copy of the weights: transformers' model over what a running vLLM has loaded, and the engine on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cachetune_rag import CacheTune, Document, UnsupportedModelError
from cachetune_rag.measuring.profiles import Profiles
from cachetune_rag.model.checkpoint import Checkpoint
from cachetune_rag.model.loaded.fingerprint import model_fingerprint
from cachetune_rag.runtime import Runtime
from cachetune_store import ChunkStore
from cachetune_vllm.cpu_turn import take_turns
from cachetune_vllm.served_check import check_served
from cachetune_vllm.served_fingerprint import config_of, served_fingerprint
from cachetune_vllm.served_model import ServedModel, served_model
from tests import families, tiny
from tests.vllm.conftest import TinyVLLM

IDS = families.random_ids(150, seed=1)
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="vLLM packs weights on CPUs only, and tiny sizes have kernels there"
)
FORMS = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
TEXTS = [
    "the first passage of some length",
    "and the second, which says other things",
    "a third one about nothing at all",
]


def vllm_config(running: TinyVLLM) -> Any:
    return running.llm.llm_engine.vllm_config


def served(running: TinyVLLM) -> ServedModel:
    model = running.model
    config = config_of(vllm_config(running).model_config)
    return served_model(model, config, torch.float32, next(model.parameters()).device)


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0]


@torch.no_grad()
def greedy(model: Any, first: torch.Tensor, cache: Any, tokens: int) -> list[int]:
    made = [int(first.argmax())]
    while len(made) < tokens:
        out = model(input_ids=torch.tensor([[made[-1]]]), past_key_values=cache, use_cache=True)
        made.append(int(out.logits[0, -1].argmax()))
    return made


@FORMS
def test_the_shared_model_computes_what_transformers_and_vllm_compute(
    tiny_vllm: Callable[..., TinyVLLM], packed: bool
) -> None:
    running = tiny_vllm("llama", packed=packed)
    made = served(running)
    assert made.form == ("packed" if packed else "dense")
    check_served(running.model, made, vllm_config(running))
    found = logits(made.model, IDS)
    torch.testing.assert_close(found, logits(running.reference, IDS), atol=2e-5, rtol=0)
    ours = found[-1].log_softmax(-1)
    for token, theirs in running.last_logprobs(IDS).items():
        assert float(ours[token]) == pytest.approx(theirs, abs=1e-4)


@FORMS
def test_an_engine_on_it_finds_what_was_precomputed_and_answers_as_vllm_does(
    tiny_vllm: Callable[..., TinyVLLM], packed: bool, tmp_path: Path
) -> None:
    running = tiny_vllm("llama", packed=packed)
    made = served(running)
    with CacheTune(running.reference, tiny.tokenizer(), tmp_path) as by_transformers:
        by_transformers.precompute(Document("d", TEXTS))
    fingerprint = served_fingerprint(made, vllm_config(running).model_config, Profiles(tmp_path))
    engine = Runtime(made.model, tiny.tokenizer(), tmp_path, fingerprint=fingerprint)
    try:
        for ratio in (1.0, 0.2):
            config = engine.admission.config("auto", ratio)
            request = engine.admission.for_prefill("what?", TEXTS[::-1], None, None, {}, config=config, started=0.0)
            state = engine.executor.read(request)
            assert state.report.missed == 0
            if ratio == 1:
                answer = greedy(made.model, state.logits[0], state.cache, 8)
                assert [answer] == running.greedy([list(request.prompt.ids)], 8)
    finally:
        engine.close()


def test_there_is_one_copy_of_the_weights_and_it_stays_as_it_is(tiny_vllm: Callable[..., TinyVLLM]) -> None:
    running = tiny_vllm("llama", packed=False)
    theirs = {tensor.untyped_storage().data_ptr() for tensor in running.model.parameters()}
    before = model_fingerprint(served(running).model)
    made = served(running).model
    assert {parameter.untyped_storage().data_ptr() for parameter in made.parameters()} <= theirs
    running.greedy([IDS], 4)
    logits(made, IDS)
    assert model_fingerprint(made) == before == model_fingerprint(running.reference)


def test_the_fingerprint_of_packed_weights_is_that_of_the_checkpoint_and_computed_once(
    tiny_vllm: Callable[..., TinyVLLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = tiny_vllm("llama", packed=True)
    made, model_config = served(running), vllm_config(running).model_config
    ChunkStore(tmp_path).close()
    found = served_fingerprint(made, model_config, Profiles(tmp_path))
    assert found == model_fingerprint(running.reference)
    monkeypatch.delattr(Checkpoint, "fingerprint")
    assert served_fingerprint(made, model_config, Profiles(tmp_path)) == found


def test_a_model_that_computes_something_else_is_refused(tiny_vllm: Callable[..., TinyVLLM]) -> None:
    running = tiny_vllm("llama", packed=True)
    config = config_of(vllm_config(running).model_config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5000.0}
    made = served_model(running.model, config, torch.float32, torch.device("cpu"))
    with pytest.raises(
        UnsupportedModelError, match="the queries of layer 0 differ between transformers' code and vLLM's"
    ):
        check_served(running.model, made, vllm_config(running))


def test_forwards_of_vllm_wait_for_the_turn_and_give_it_back() -> None:
    class Failing(torch.nn.Module):
        def forward(self, fail: bool) -> None:
            if fail:
                raise ValueError

    model = Failing()
    turn = take_turns(model)
    forward = threading.Thread(target=model, args=(False,))
    with turn:
        forward.start()
        forward.join(0.1)
        assert forward.is_alive()
    forward.join(30)
    assert not forward.is_alive()
    with pytest.raises(ValueError):  # noqa: PT011
        model(True)
    other = threading.Thread(target=model, args=(False,))
    other.start()
    other.join(30)
    assert not other.is_alive()


def is_taken(turn: Any) -> bool:
    """Whether no thread but the caller's could enter."""
    entered: list[bool] = []

    def try_to_enter() -> None:
        entered.append(turn.acquire(blocking=False))
        if entered[0]:
            turn.release()

    other = threading.Thread(target=try_to_enter)
    other.start()
    other.join()
    return not entered[0]


SHARING_MEMORY = ("onednn_mm", "cpu_attn_get_scheduler_metadata", "cpu_attention_with_kv_cache")
"""Those of vLLM's kernels that write to the scratch memory of the process, or free it, and that a plain model calls."""


def test_one_thread_at_a_time_is_in_vllms_kernels_that_share_memory(
    tiny_vllm: Callable[..., TinyVLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once write to memory that was freed: that ended a server, and rarely enough that no test of servers would show it."""
    import vllm._custom_ops as ops

    running = tiny_vllm("llama", packed=True)
    made, turn = served(running).model, take_turns(running.model)
    called: dict[str, list[bool]] = {name: [] for name in SHARING_MEMORY}

    def watched(name: str) -> None:
        kernel = getattr(ops, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            called[name].append(is_taken(turn))
            return kernel(*args, **kwargs)

        monkeypatch.setattr(ops, name, call)

    for name in SHARING_MEMORY:
        watched(name)
    running.greedy([IDS, IDS[:40]], 3)
    before = len(called["onednn_mm"])
    logits(made, IDS)
    assert len(called["onednn_mm"]) > before
    assert {name: set(taken) for name, taken in called.items()} == {name: {True} for name in SHARING_MEMORY}
    assert not is_taken(turn)


def test_what_vllm_asks_of_a_model_beside_its_forward_takes_the_turn() -> None:
    class Asked(torch.nn.Module):
        def embed_multimodal(self, pixels: int) -> tuple[int, bool]:
            return pixels, is_taken(turn)

        embed_input_ids = compute_logits = embed_multimodal

    model = Asked()
    turn = take_turns(model)
    take_turns(model)  # once more: a model is served again after a restart in the same process
    for ask in (model.embed_multimodal, model.embed_input_ids, model.compute_logits):
        assert ask(pixels=3) == (3, True)
    assert not is_taken(turn)
