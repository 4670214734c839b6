"""Models some of whose layers look back over a window only. vLLM keeps all of their rows when it has a connector."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.vllm.conftest import TinyVLLM
from tests.vllm.test_connector import ON_CPU, TOKENS, Served, filled_store, report, shuffled, transfer


@pytest.fixture(scope="module")
def sliding(tiny_vllm: Callable[..., TinyVLLM], tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Gemma 3: five layers with a window, then one without."""
    _, store = filled_store(tmp_path_factory.mktemp("sliding"), "gemma3")
    return Served(tiny_vllm("gemma3", packed=False, kv_transfer_config=transfer(store)), store)


def test_all_layers_share_one_group_of_pages(sliding: Served) -> None:
    (group,) = sliding.scheduler.kv_cache_config.kv_cache_groups
    assert len(group.layer_names) == sliding.tiny.reference.config.num_hidden_layers
    kinds = sliding.tiny.reference.config.layer_types
    assert len(set(kinds)) == 2  # otherwise this module would show nothing


@ON_CPU
@pytest.mark.parametrize(("selector", "ratio"), [("frequency", 0.15), ("expected_error", 0.15), ("none", 0.0)])
def test_answers_are_those_of_the_embedded_engine(sliding: Served, selector: str, ratio: float) -> None:
    prompts = [shuffled(seed) for seed in range(3)]
    found = sliding.ask(prompts, selector=selector, ratio=ratio)
    assert all(report(out)["reused"] > 0 for out in found)
    assert [list(out.outputs[0].token_ids) for out in found] == sliding.engines(prompts, selector=selector, ratio=ratio)


@ON_CPU
def test_plain_requests_are_vllms_own(sliding: Served) -> None:
    prompts = [shuffled(seed) for seed in range(10, 12)]
    sliding.tokens(prompts, selector="none", ratio=0)
    plain = sliding.plain(prompts)
    assert plain == [sliding.tiny.reference_tokens(list(prompt.ids), TOKENS) for prompt in prompts]
    assert sliding.tokens(prompts, ratio=1.0) == plain
    sliding.assert_nothing_left_behind()
