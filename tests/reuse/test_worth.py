"""Whether reuse pays: from how many tokens on, and at which share of what is to be computed."""

from __future__ import annotations

from typing import Any

import pytest

from cachetune_rag import ConfigError, Prompt
from cachetune_rag.reuse.worth import WorthLimits, savings_of
from cachetune_rag.text.recognising.id_spans import IdSpan, prompt_of_ids


def prompt_of(length: int, *spans: tuple[int, int]) -> Prompt:
    return prompt_of_ids(range(length), [IdSpan(start, end, start) for start, end in spans])


@pytest.mark.parametrize(
    ("prompt", "ratio", "options", "wanted"),
    [
        (prompt_of(100, (10, 60), (70, 90)), 0.0, {}, (100, 70)),
        (prompt_of(100, (10, 60), (70, 90)), 0.15, {}, (100, 60)),
        (prompt_of(100, (10, 60), (70, 90)), 0.0, {"cached": 40}, (60, 40)),
        (prompt_of(100, (10, 60), (70, 90)), 0.0, {"missing": {0}}, (100, 20)),
        (prompt_of(100, (0, 100)), 0.0, {}, (100, 99)),
        # New passages that are computed twice take from what is spared: 10 between the chunks and 10 behind them, but not those before.
        (prompt_of(100, (10, 60), (70, 90)), 0.0, {"twice": True}, (100, 50)),
        (prompt_of(100, (10, 60), (70, 90)), 0.0, {"twice": True, "cached": 65}, (35, 5)),
        (prompt_of(100, (10, 60), (70, 90)), 0.0, {"twice": True, "missing": {0}}, (100, 10)),
    ],
)
def test_what_is_spared(prompt: Prompt, ratio: float, options: dict[str, Any], wanted: tuple[int, int]) -> None:
    savings = savings_of(prompt, ratio, **options)
    assert (savings.to_compute, savings.spared) == wanted
    assert savings.too_little(WorthLimits(0, 0.0)) is None


@pytest.mark.parametrize(
    ("prompt", "ratio", "options", "reason"),
    [
        (prompt_of(5000), 0.0, {}, "no stored chunk stands in the prompt"),
        (prompt_of(5000, (0, 2000)), 1.0, {}, "no token of a stored chunk would be spared"),
        (prompt_of(5000, (0, 2000)), 0.0, {"cached": 2000}, "no token of a stored chunk would be spared"),
        (prompt_of(5000, (0, 1535)), 0.0, {}, "reuse would spare 1535 tokens, and least_reused is 1536"),
        (
            prompt_of(5000, (0, 1950)),
            0.0,
            {},
            "reuse would spare 39% of 5000 tokens, and from 40% on it is used (a number of your own for least_reused stands in place of "
            "that)",
        ),
        (prompt_of(5000, (0, 2000)), 0.0, {}, None),
        (prompt_of(5000, (0, 2500)), 0.0, {"twice": True}, "reuse would compute as many new tokens twice as it spares"),
        (prompt_of(5000, (3400, 5000)), 0.0, {"cached": 3400}, None),
    ],
)
def test_why_it_does_not_pay(prompt: Prompt, ratio: float, options: dict[str, Any], reason: str | None) -> None:
    assert savings_of(prompt, ratio, **options).too_little() == reason


@pytest.mark.parametrize("odd", [{"least_reused": -1}, {"least_reused": 1.5}, {"least_share": 2}, {"least_share": "x"}])
def test_limits_out_of_range_are_refused(odd: dict[str, Any]) -> None:
    (name,) = odd
    with pytest.raises(ConfigError, match=f"{name} is .*: use"):
        WorthLimits(**odd)
