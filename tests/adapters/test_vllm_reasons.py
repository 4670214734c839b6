"""The reasons why a vLLM server reuses nothing are those that the docs explain."""

from __future__ import annotations

import re
from pathlib import Path

from cachetune_vllm.reasons import Left

DOCS = Path(__file__).parents[2] / "docs" / "vllm.md"


def test_the_docs_explain_exactly_the_reasons_that_there_are() -> None:
    section = DOCS.read_text().split("## What is left to vLLM")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| [^|]+ \|", section, re.MULTILINE)
    assert rows == [reason.value for reason in Left]
