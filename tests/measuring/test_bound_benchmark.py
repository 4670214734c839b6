"""The study of bounds: its rank correlation, what requests with a bound are held against, and one record measured with a tiny model."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import llama, tokenizer

from cachetune_rag.selection import ReusedChunk, get_selector
from cachetune_rag.selection.probing import ProbingSelector
from cachetune_rag.selection.registry import _SELECTORS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bound
from fidelity import bounds, spending
from fidelity.bounds import SIGN, Request, kept, misses_at, rank_correlation, requests_of
from fidelity.evaluate import Engines
from fidelity.records import Dataset, Record
from fidelity.shaken import Shaken
from fidelity.signs import NotingSelector, SignStudy

HEADER = {"model": "m", "dtype": "float32", "commit": "c", "environment": {"processor": "p"}}
RATIOS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)


def made(noise: float, count: int = 120, spread: float = 2.0) -> list[Request]:
    """Requests whose KL is the square of their sign, but for noise."""
    rng = np.random.default_rng(0)
    found = []
    for hard, luck in zip(rng.normal(0, spread, count), rng.normal(0, noise, count), strict=True):
        signs = tuple(float(np.exp(hard / 2) * (1 - ratio) / ratio**0.5) for ratio in RATIOS)
        kl = tuple(float(0.001 * sign**2 * np.exp(luck)) for sign in signs)
        found.append(
            Request(RATIOS, kl, kl, tuple(each < 0.1 for each in kl), {SIGN: signs, "none": tuple(signs[::-1])})
        )
    return found


def rows_of(name: str, count: int) -> list[dict[str, Any]]:
    """Rows of records as the benchmark writes them, at ratio 0 and two others."""
    signs = {"watched": 1.0, "entropy": 2.0, "mass_left": 0.5, "moved": 0.1}
    return [
        {"set": name, "record": f"r{n}", "ratio": ratio, "kl": [0.01 * n + 1 - ratio], "same": [True], "signs": {**signs, "error_left": (1 - ratio) * n, "error_last_left": (1 - ratio) * n}}
        for n in range(count)
        for ratio in (0.0, 0.2, 0.5)
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def few_divisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "DIVISIONS", 2)


def test_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    # 1 - 6 * sum of d^2 / (n (n^2 - 1)), which holds without equal values
    assert rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))


def test_a_sign_that_says_all_beats_a_fixed_ratio_and_one_that_says_little_does_not() -> None:
    sure, unsure = kept(made(0.05), max_kl=0.02), kept(made(2.0, spread=0.1), max_kl=0.02)
    assert sure is not None
    assert unsure is not None
    assert sure.over < 0.1
    assert sure.against is not None
    assert sure.against.value < 0.5
    assert sure.needed > sure.ratio
    assert unsure.over > 0.5 * unsure.fixed


def test_a_bound_that_nothing_keeps_spends_everything() -> None:
    found = kept(made(0.5), max_kl=0)
    assert found is not None
    assert (found.over, found.ratio, found.full) == pytest.approx((0, 1, 1))


def test_records_that_are_too_few_to_fit_to_are_named_and_those_of_other_sets_are_shown() -> None:
    assert kept(made(0.5, 12), max_kl=0.05) is None
    text = bounds.markdown(HEADER, [*rows_of("documents", 14), *rows_of("questions", 3)])
    assert "Left out, because a prediction is fitted to 10 other records at least: questions (3). Measure more" in text
    assert "| documents (14) | `max_kl=0.05` | " in text
    assert "| both (17) | `min_top1=0.9` | " in text
    assert "| questions (3) | error left x entropy | " in text


def test_a_run_ends_with_the_tables_of_what_is_there_so_far(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bound, "open_model", lambda args: (llama(max_positions=8192), tokenizer()))
    lead = "The ships came by in winter, and the lamp was lit at four. " * 40
    records = tuple(
        Record(f"r{n}", "made", (f"It was built in 18{n}1.", "It burned oil."), "When?", ()) for n in (1, 2)
    )
    sets = [Dataset("made", records, (lead,) * 4, "Read.")]
    monkeypatch.setattr(bound, "read_sets", lambda args, tokenizer: sets)
    words = ["--device", "cpu", "--commit", "c", "--ratios", "0.2", "0.5", "--out", str(tmp_path)]

    def put_for_now(selector: NotingSelector) -> None:
        monkeypatch.setitem(_SELECTORS, selector.name, selector)

    monkeypatch.setattr(bound, "register_selector", put_for_now)

    def run(*more: str) -> str:
        bound.main([*words, *more])
        return capsys.readouterr().out

    assert "| made (1) | entropy of the next token, nothing recomputed | - / - | - / - |" in run("--seconds", "0")
    table = run()
    assert "at least: made (2). Measure more records." in table
    assert (tmp_path / "table.md").read_text() in table
    assert "made (2)" in run("--report", str(tmp_path))


def test_a_price_divides_recomputing_no_worse_than_levelling_where_the_sign_says_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spending, "MAX_KL", (0.02, 0.05))
    monkeypatch.setattr(spending, "PRICES", np.geomspace(0.03, 30, 12).tolist())
    monkeypatch.setattr(spending, "SHARES", (0.5, 0.7, 0.8, 0.9, 0.95, 0.985))
    requests = [
        replace(
            each, signs={**each.signs, spending.BY_LAST: each.signs["none"], spending.SHAKEN_LAST: each.signs[SIGN]}
        )
        for each in made(0.7, spread=1.0)
    ]
    sums, fixed, count = spending.at_equal_cost(requests)
    assert count > 0
    levelled, priced = (sums[way].sum() for way in sums if "all watched tokens" in way)
    assert priced < levelled < fixed.sum()
    # A sign that says the opposite, or nothing, is no better than one ratio for all.
    assert all(sums[way].sum() > 0.9 * fixed.sum() for way in sums if "last token" in way)
    # The sign of the present way by another name.
    (shaken,) = (sums[way] for way in sums if way == "level, by shaking")
    assert shaken == pytest.approx(sums[spending.PRESENT])
    assert len(spending.at_equal_cost([replace(each, signs={SIGN: each.sign}) for each in requests])[0]) == 2
    table = spending.markdown({"made": requests, "few": requests[:12]})
    assert f"| made (120) | {spending.PRESENT} | {count} | " in table
    assert f"{priced / levelled:.2f} [" in table
    assert "few" not in table


def test_what_is_missed_at_a_cost_lies_between_two_settings() -> None:
    none, every = np.zeros(4), np.ones(4)
    curve = [(none, np.full(4, 0.5)), (every, np.full(4, 0.1))]
    assert spending.at_cost(curve, 0.3) == pytest.approx(np.full(4, 0.5))
    assert spending.at_cost(curve, 0.1) == pytest.approx(every)
    assert spending.at_cost(curve, 0.6) is None
    assert spending.at_cost(curve, 0.05) is None


def test_ratios_between_measured_ones_are_interpolated() -> None:
    request = replace(
        made(0.0, 1)[0], kl=(0.08, 0.04, 0.02, 0.01, 0.005, 0.001), same=(False, True, True, True, True, True)
    )
    assert misses_at(request, 0.05, 0.03) == 1  # as measured
    assert misses_at(request, 0.1, 0.03) == 0
    assert misses_at(request, 0.07, 0.03) == misses_at(request, 0.072, 0.0278) == 0
    assert misses_at(request, 0.07, 0.028) == 1
    assert misses_at(request, 1, 0.0001) == 0
    assert 0 < misses_at(request, 0.03, None) < 1


def test_a_records_rows_make_a_request_with_the_sign_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    noting = NotingSelector(_probing("expected_error"))
    monkeypatch.setitem(_SELECTORS, noting.name, noting)
    lead = "The ships came by in winter, and the lamp was lit at four. " * 40
    record = Record("r", "made", ("The lighthouse was built in 1871.", "Its lamp burned oil."), "Who built it?", ())
    dataset = Dataset("made", (record,), (lead,) * 4, "Read.")
    engines = Engines(llama(max_positions=8192), tokenizer())
    try:
        study = SignStudy(engines, dataset, noting, "expected_error", [0.2, 0.5])
        rows = list(study.run(record, {}))
        assert [row["ratio"] for row in rows] == [0.0, 0.2, 0.5]
        nothing, some, more = (row["signs"] for row in rows)
        # What is recomputed isn't shaken.
        assert nothing["shaken"] > some["shaken"] > more["shaken"] > 0
        assert nothing["shaken_last"] > some["shaken_last"] > more["shaken_last"] > 0
        (request,) = requests_of(rows)["made"]
        assert request.ratios == (0.2, 0.5)
        assert request.sign[0] > request.sign[1] > 0
        engine = engines.get(dataset, "auto", "exact")
        engine.precompute(record.chunks)
        # The sign is that of a request with a bound.
        engine.calibrate([{"query": f"{n}?", "chunks": record.chunks} for n in range(12)], ratios=[0.2, 0.5], tokens=1)
        prompt = dataset.prompt(engine.prompts, record)
        ladder = engine.prefill(prompt=prompt, max_kl=1e9).report.prediction.ladder  # type: ignore[union-attr]
        assert request.sign == pytest.approx([each.sign for each in ladder], rel=1e-3)
    finally:
        engines.close()


def test_a_prompt_of_which_nothing_is_left_is_not_shaken() -> None:
    lead = "The ships came by in winter, and the lamp was lit at four. " * 40
    record = Record("r", "made", ("The lighthouse was built in 1871.",), "Who built it?", ())
    dataset = Dataset("made", (record,), (lead,) * 4, "Read.")
    engines = Engines(llama(max_positions=8192), tokenizer())
    try:
        engine = engines.get(dataset, "auto", "exact")
        engine.precompute(record.chunks)
        prompt = dataset.prompt(engine.prompts, record)
        nothing = engine.prefill(prompt=prompt, ratio=0)
        (span,) = prompt.spans
        places = list(range(span.start, span.end))
        columns = 2 * engine.adapter.num_layers * engine.adapter.model.config.num_key_value_heads
        off = torch.full((len(places), columns), 0.3, dtype=torch.float16)
        chunks = [ReusedChunk(span.start, torch.arange(len(places)), torch.zeros(len(places)), lambda: off)]
        shaken = Shaken(engine, nothing, chunks)
        assert shaken.signs([]) == pytest.approx({"shaken": 0, "shaken_last": 0}, abs=1e-9)
        found = shaken.signs(places)
        assert found == shaken.signs(places)
        assert min(found.values()) > 1e-6
        # Beside a token that isn't shaken, more tokens move the next one further.
        assert found["shaken"] > shaken.signs(places[:3])["shaken"] > 0
    finally:
        engines.close()


def _probing(name: str) -> ProbingSelector:
    selector = get_selector(name)
    assert isinstance(selector, ProbingSelector)
    return selector
