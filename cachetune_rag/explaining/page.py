"""The page that shows an explanation: one HTML file that needs no network, no script and nothing beside it.

Texts of documents are not trusted. All are escaped by the template engine, and the page's content security policy lets nothing but its own style
sheet be used, so not even markup that got through could do or fetch anything.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from cachetune_rag.checking.escaping import visible
from cachetune_rag.explaining import figures, overview
from cachetune_rag.explaining.explanation import Explanation, Part, Run

_TEMPLATES = resources.files("cachetune_rag.explaining") / "templates"
LETTERS = {"computed": "c", "kept": "k", "reused": "u", "recomputed": "r", "skipped": "s", "missed": "m"}
"""The class of a run's element by its fate: a long prompt has ten thousand of them, so it is short."""


def html_page(explanation: Explanation) -> str:
    """The page as text, to be written to a file with the ending .html, in UTF-8."""
    style = _read("page.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return _template().render(
        style=Markup(style),  # ours, and `<style>` knows no escapes
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        e=explanation,
        view=overview.view_of(explanation),
        letters=LETTERS,
    )


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FunctionLoader(_read),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "shown": shown,
        "share": figures.share,
        "seconds": figures.seconds,
        "count": figures.count,
        "nats": figures.nats,
        "runs": runs_html,
    }
    return environment.get_template("page.html.jinja")


def _read(name: str) -> str:
    return (_TEMPLATES / name).read_text("utf-8")


def shown(text: str | None) -> str:
    """A text from outside, with characters that would reorder the page, or that HTML can't hold, spelt out."""
    return visible(text or "")


def runs_html(part: Part, usual: str) -> Markup:
    """The elements of a part's runs. Runs of the part's usual fate are bare text: the part's own element says it for them.

    Not in the template: for ten thousand runs that takes a second.
    """
    pieces = []
    for run in part.runs:
        text = escape(_drawn(run, part))
        pieces.append(text if run.fate == usual else Markup(f"<span class={LETTERS[run.fate]}>{text}</span>"))
    return Markup("").join(pieces)


def _drawn(run: Run, part: Part) -> str:
    """The text of a run. One that is nothing but white space gets a mark, or nobody would see it."""
    text = run.text
    if text is None:
        return f"[{figures.count(run.tokens)} tokens] "
    if not text.strip():
        end = "↵\n" if part.kind != "between" else "↵"
        text = text.replace("\n", end) if "\n" in text else "␣" * len(text)
    return shown(text)
