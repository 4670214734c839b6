"""Explains a prompt with the demo's model: a page that shows what became of each of its tokens. It is the page in docs/explain.md.

python examples/explain.py page.html       # then open page.html in a browser
"""

from __future__ import annotations

import pydoc_data.topics
import sys
import tempfile
from pathlib import Path

from smollm2 import model_path

from cachetune_rag import CacheTune, Document
from cachetune_rag.explaining import html_page

TOPICS = ("assert", "nonlocal", "raise", "with", "for", "del")
QUESTION = "Which statement lets names refer to variables of an enclosing function?"


def passages(topic: str) -> list[str]:
    """A topic of Python's own documentation, in passages of about a thousand characters."""
    found = [""]
    for paragraph in pydoc_data.topics.topics[topic].split("\n\n"):
        if len(found[-1]) + len(paragraph) > 1000:
            found.append("")
        found[-1] = f"{found[-1]}\n\n{paragraph}".strip()
    return found


def main(page: str, store: str) -> None:
    stored = {topic: passages(topic)[:1] for topic in TOPICS}
    with CacheTune.from_pretrained(str(model_path()), store=store) as engine:
        engine.precompute(Document(f"{topic}.txt", texts) for topic, texts in stored.items())
        shown = [stored[topic][0] for topic in TOPICS]
        # One passage was edited after it was stored, as happens: it is missed, and the page says what was changed.
        shown[3] = shown[3].replace("context manager", "context-manager", 1)
        engine.explain(QUESTION, shown, max_new_tokens=1)  # a process's first forward is slower
        found = engine.explain(QUESTION, shown, compare=True, max_new_tokens=40)
    Path(page).write_text(html_page(found), encoding="utf-8")
    print(f"{page}: {found.report['prompt_tokens']} tokens, {found.report['reused']} of them reused")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} page.html")
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1], folder)
