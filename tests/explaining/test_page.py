"""The page of an explanation: it shows everything, texts of documents stay texts, and its colours can be read."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise
from typing import Any

import pytest
from made import FATES, made

from cachetune_rag.explaining import Explanation, html_page
from cachetune_rag.explaining.explanation import FATES as KNOWN
from cachetune_rag.explaining.explanation import ExplainedAnswer, ExplainedChunk, NearText, Run
from cachetune_rag.explaining.overview import MEANINGS, PHASES, counts_of, view_of
from cachetune_rag.explaining.page import LETTERS
from cachetune_rag.reuse.account import Fate

EVIL = '</script><script>alert(1)</script></style><img src=x onerror="alert(1)">\'"&lt;{{ 7 * 7 }}'
STYLE = (resources.files("cachetune_rag.explaining") / "templates" / "page.css").read_text()


SERVED: dict[str, Any] = {
    "parts": (), "chunks": (), "attention": None, "predicted": None, "divergence": None, "reuse": None, "full": None, "source": "server",
}  # fmt: skip
"""What is known by a report alone."""


class Seen(HTMLParser):
    """What a page consists of: every element with its attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._hidden = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._hidden = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._hidden else data


def evil(value: Any) -> Any:
    """The same explanation with every text in it replaced by markup."""
    if isinstance(value, dict):
        return {name: each if name in KEPT else evil(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [evil(each) for each in value]
    return EVIL if isinstance(value, str) else value


KEPT = {"fate", "kind", "outcome", "source", "format", "tier", "codec", "timings", "bytes_read"}


def test_it_shows_every_section_and_token() -> None:
    explanation = made()
    seen = Seen(html_page(explanation))
    for part in explanation.parts:
        for run in part.runs:
            if (run.text or "").strip():
                assert (run.text or "") in seen.text
    for words in (
        "How many ships?",
        "a-model",
        "Both answers",
        "Eleven balloons.",
        "four brothers",
        "three brothers",
        "d2",
        "6.2 times sooner",
    ):
        assert words in seen.text
    assert [attrs["id"] for tag, attrs in seen.elements if tag == "section"] == [
        "glance", "answers", "prompt", "chunks", "attention", "divergence", "time",
    ]  # fmt: skip


def test_advice_stands_at_the_top() -> None:
    explanation = made()
    advised = dataclasses.replace(explanation, report={**explanation.report, "advice": ["Cut chunks at <sentences>."]})
    seen = Seen(html_page(advised))
    assert "Cut chunks at <sentences>." in seen.text.split("What became of the")[0]


def test_every_fate_and_phase_has_a_name_a_style_and_a_meaning() -> None:
    assert tuple(MEANINGS) == FATES == tuple(LETTERS) == KNOWN
    assert set(FATES) == {fate.value for fate in Fate}
    for fate, letter in LETTERS.items():
        assert re.search(rf"^\.{letter} \{{", STYLE, re.MULTILINE)
        assert f".f-{fate} {{" in STYLE
        assert f"#show-{fate}:" in STYLE
        assert f'content: " ({fate}:) "' in STYLE
    for phase in PHASES:
        assert f".f-{phase} {{" in STYLE


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_chunk_is_found_by_its_number_where_another_was_in_a_servers_prefix_cache(gone: int) -> None:
    """Then neither the prompt's parts nor its chunks have that one, and the others keep their numbers."""
    whole = made(4)
    explanation = dataclasses.replace(
        whole,
        source="server",
        parts=tuple(part for part in whole.parts if part.chunk != gone),
        chunks=tuple(
            dataclasses.replace(chunk, tier=f"tier{chunk.number}") for chunk in whole.chunks if chunk.number != gone
        ),
    )
    seen = Seen(html_page(explanation)).text
    rows = re.findall(r"^(\d+)(?: d\d)?\n(?:stored|missed) (tier\d)", seen, re.MULTILINE)
    assert rows == [(str(number + 1), f"tier{number}") for number in range(4) if number != gone]


def test_all_of_the_time_is_shown_also_that_of_a_phase_without_a_name() -> None:
    answer = made().reuse
    assert answer is not None
    timed = dataclasses.replace(answer, ttft=0.1, timings={"lookup": 0.01, "read_again": 0.04, "unheard_of": 0.03})
    pieces = view_of(made(reuse=timed, full=None)).times[0][1]
    assert {piece.name: round(piece.value, 9) for piece in pieces} == {"lookup": 0.01, "read_again": 0.04, "rest": 0.05}
    assert round(sum(piece.width for piece in pieces)) == 1000
    assert "read again" in Seen(html_page(made(reuse=timed, full=None))).text


def test_markup_in_any_text_stays_text() -> None:
    explanation = Explanation.from_dict(evil(json.loads(json.dumps(made().as_dict()))))
    page, plain = html_page(explanation), html_page(made())
    seen, expected = Seen(page), Seen(plain)
    assert {tag for tag, _ in seen.elements} <= {tag for tag, _ in expected.elements}
    assert {name for _, attrs in seen.elements for name in attrs} <= {
        name for _, attrs in expected.elements for name in attrs
    }
    assert not [tag for tag, _ in seen.elements if tag in ("script", "img", "link", "iframe", "object", "base", "form")]
    assert page.count("</style>") == 1
    assert EVIL in seen.text


@pytest.mark.parametrize("letter", ["\u202e", "\x00", "\x1b", "\ud800", "\u2066"])
def test_characters_that_reorder_or_break_a_page_are_spelt_out(letter: str) -> None:
    parts = (dataclasses.replace(made().parts[0], runs=(Run("computed", 3, f"a{letter}b"),)),)
    page = html_page(made(parts=parts, chunks=(), question=f"x{letter}"))
    assert letter not in page
    page.encode()
    assert "a\\" in Seen(page).text


def test_the_policy_lets_only_the_own_style_be_used() -> None:
    seen = Seen(html_page(made()))
    (policy,) = (
        attrs["content"] for tag, attrs in seen.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert re.fullmatch(
        r"default-src 'none'; style-src 'sha256-[\w+/=]+'; base-uri 'none'; form-action 'none'", policy or ""
    )
    for tag, attrs in seen.elements:
        assert tag not in ("script", "img", "link", "iframe")
        assert not [name for name in attrs if name == "style" or name.startswith("on")]
        assert (attrs.get("href") or "#").startswith("#")


def test_links_and_labels_lead_somewhere() -> None:
    seen = Seen(html_page(made()))
    ids = [attrs["id"] for _, attrs in seen.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in seen.elements:
        assert (attrs.get("href") or "#main")[1:] in ids
        assert (attrs.get("aria-labelledby") or "main") in ids
    levels = [int(tag[1]) for tag, _ in seen.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(
        "aria-label" in attrs or attrs.get("aria-hidden") == "true" for tag, attrs in seen.elements if tag == "svg"
    )


def test_bars_and_map_have_the_sizes_of_what_they_show() -> None:
    explanation = made(count=20, tokens=100)
    view = view_of(explanation)
    assert sum(piece.width for piece in view.bar) == pytest.approx(1000, abs=0.1)
    assert sum(view.counts.values()) == explanation.report["prompt_tokens"]
    areas = {
        fate: sum(float(w) * float(h) for w, h in re.findall(r"h([\d.e-]+)v([\d.e-]+)h-", path)) / 100_000
        for fate, path in view.map.items()
    }
    total = sum(view.counts.values())
    for fate, number in view.counts.items():
        assert areas[fate] == pytest.approx(number / total, abs=0.01)
    (reuse, pieces, seconds), (full, _, _) = view.times
    assert (reuse, full) == ("With reuse", "Full prefill")
    assert sum(piece.value for piece in pieces) == pytest.approx(seconds) == pytest.approx(0.08)
    assert sum(piece.width for piece in pieces) == pytest.approx(1000 * 0.08 / 0.5, abs=0.1)


def test_a_page_without_parts_shows_the_reports_sums() -> None:
    whole = made()
    less = made(**SERVED)
    assert counts_of(less) == counts_of(whole)
    seen = Seen(html_page(less))
    assert [attrs["id"] for tag, attrs in seen.elements if tag == "section"] == ["glance"]
    assert "Made from a server's response" in seen.text


@pytest.mark.parametrize(
    "fields",
    [
        {"full": None, "divergence": None},
        {"predicted": None, "attention": None},
        {"reuse": ExplainedAnswer(None, 0, True, None), "full": None, "divergence": None},
        {"chunks": (), "near": (NearText("case", "other case", 0, "", "A", ""),)},
        SERVED | {"report": {"left": "few", "reused": 0}, "left": "few"},
        {"chunks": tuple(ExplainedChunk(n, "timed out", "The disk.", None) for n in range(3))},
    ],
)
def test_what_is_not_known_is_left_out(fields: dict[str, Any]) -> None:
    assert Seen(html_page(made(**fields))).text


# -- colours ----------------------------------------------------------------------------------------------------------


def colours(dark: bool) -> dict[str, str]:
    light, _, rest = STYLE.partition("@media (prefers-color-scheme: dark)")
    found = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})", light))
    return found | dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})", rest)) if dark else found


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_texts_stand_out_as_wcag_asks(dark: bool) -> None:
    """4.5 for texts; 3 for what is drawn, against what it is drawn on."""
    of = colours(dark)
    texts = [("ink", "page"), ("ink", "card"), ("soft", "page"), ("soft", "card"), ("link", "page"), ("ink", "mark")]
    texts += [(f"{letter}-ink", letter) for letter in LETTERS.values()]
    assert {
        pair: contrast(of[pair[0]], of[pair[1]]) for pair in texts if contrast(of[pair[0]], of[pair[1]]) < 4.5
    } == {}
    drawn = [(f"{letter}-line", letter) for letter in "rsm"] + [("level", "trough")]
    assert {pair: contrast(of[pair[0]], of[pair[1]]) for pair in drawn if contrast(of[pair[0]], of[pair[1]]) < 3} == {}
