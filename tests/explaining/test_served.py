"""Explanations from a server's response: what a worker adds to a report, and the page that is made of it without model and store."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, ConfigError, Document
from cachetune_rag.answering.request import Request
from cachetune_rag.cli.app import main
from cachetune_rag.explaining import html_page
from cachetune_rag.explaining.served import EXPLAINED, explained, explanation_of
from cachetune_rag.reuse.account import Account
from cachetune_rag.reuse.state import PrefillState

CHUNKS = [
    "The lighthouse was built in 1871 by three brothers from the next valley.",
    "Its lamp burned whale oil until 1902, when paraffin reached the island.",
]


@pytest.fixture(scope="module")
def engine() -> Iterator[CacheTune]:
    with CacheTune(llama(), tokenizer()) as made:
        made.precompute([Document("secret-name.md", CHUNKS)])
        yield made


def answered(engine: CacheTune, *, explain: bool = True, **report: Any) -> dict[str, Any]:
    """A response as a server gives it, with the prompt put together as its worker does."""
    runtime, accounts = engine.runtime, list[Account]()
    prompt = engine.prompts.build(query="How old is it?", chunks=[*CHUNKS, "A stranger."])
    request = Request.measured(prompt, runtime.admission.config("auto", 0.2))
    state = runtime.executor.reuse(request, runtime.assembler.memory, account=accounts.append if explain else None)
    assert isinstance(state, PrefillState)
    said = state.report.as_dict() | report
    if explain:
        said[EXPLAINED] = explained(prompt, accounts[-1], runtime.tokenizer)
    response = {
        "model": "served-model",
        "choices": [{"message": {"role": "assistant", "content": "Very old."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": len(prompt.ids), "completion_tokens": 3},
        "kv_transfer_params": {"cachetune": said},
    }
    made: dict[str, Any] = json.loads(json.dumps(response))
    return made


def test_it_has_the_fates_that_an_engine_tells(engine: CacheTune) -> None:
    found = explanation_of(answered(engine))
    expected = engine.explain("How old is it?", [*CHUNKS, "A stranger."], ratio=0.2, max_new_tokens=1)
    # What an engine has kept of the prompt's beginning counts as kept; the rest is the same.
    merge = {"kept": "computed"}
    runs = [[(merge.get(r.fate, r.fate), r.text) for r in part.runs] for part in found.parts]
    assert runs == [[(merge.get(r.fate, r.fate), r.text) for r in part.runs] for part in expected.parts]
    assert [chunk.outcome for chunk in found.chunks] == ["stored", "stored", "missed"]
    assert (found.source, found.model) == ("server", "served-model")
    assert found.reuse is not None
    assert (found.reuse.text, found.reuse.tokens, found.reuse.ended) == ("Very old.", 3, True)
    assert (found.attention, found.predicted, found.divergence, found.full) == (None, None, None, None)


def test_it_names_no_document_and_no_key(engine: CacheTune) -> None:
    assert "secret-name" not in json.dumps(answered(engine))
    assert all(chunk.document is None and chunk.key == "" for chunk in explanation_of(answered(engine)).chunks)


def test_the_page_says_what_it_cannot_show(engine: CacheTune) -> None:
    page = html_page(explanation_of(answered(engine)))
    assert "Made from a server" in page
    assert "Very old." in page
    assert "A stranger." in page
    sums = html_page(explanation_of(answered(engine, explain=False)))
    assert 'id="prompt"' not in sums
    assert "not which tokens and chunks they were" in sums


def test_a_request_that_was_left_to_vllm_has_a_page_that_says_why() -> None:
    report = {"reused": 0, "left": "few", "why": "reuse would save 80 tokens"}
    found = explanation_of({"usage": {"prompt_tokens": 90}, "kv_transfer_params": {"cachetune": report}})
    assert (found.left, found.report["prompt_tokens"]) == ("few", 90)
    page = html_page(found)
    assert "Left to vLLM: few" in page
    assert "reuse would save 80 tokens" in page
    del report["why"]
    assert "Left to vLLM: few." in html_page(explanation_of({"kv_transfer_params": {"cachetune": report}}))


@pytest.mark.parametrize("response", [{}, {"kv_transfer_params": None}, {"kv_transfer_params": {"cachetune": 3}}, []])
def test_a_response_without_a_report_is_refused(response: Any) -> None:
    with pytest.raises(ConfigError, match='"explain": true'):
        explanation_of(response)


def test_explanations_of_another_release_are_refused(engine: CacheTune) -> None:
    response = answered(engine)
    response["kv_transfer_params"]["cachetune"][EXPLAINED]["format"] = 99
    with pytest.raises(ConfigError, match="format 99"):
        explanation_of(response)


def test_the_command_reads_a_file_or_stdin(
    engine: CacheTune, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    response, page = tmp_path / "response.json", tmp_path / "page.html"
    response.write_text(json.dumps(answered(engine)))
    for source in (str(response), "-"):
        monkeypatch.setattr(sys, "stdin", StringIO(response.read_text()))
        with pytest.raises(SystemExit) as ended:
            main(["explain-response", source, "--html", str(page)])
        assert not ended.value.code
        assert page.read_text(encoding="utf-8") == html_page(explanation_of(json.loads(response.read_text())))
        assert "Chunk 3: missed" in capsys.readouterr().out
    response.write_text("no json")
    with pytest.raises(SystemExit) as ended:
        main(["explain-response", str(response)])
    assert ended.value.code == 2
    assert "is no JSON" in capsys.readouterr().err
