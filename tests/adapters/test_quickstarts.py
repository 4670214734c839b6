"""The quickstarts run, and reuse what they stored."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.real_model
@pytest.mark.parametrize("name", ["llama_index_quickstart.py", "langchain_quickstart.py"])
def test_a_quickstart(name: str, smollm2_path: Path) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < 40
    done = subprocess.run([sys.executable, name], cwd=EXAMPLES, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    reports = re.findall(r"(\d+) reused, (\d+) recomputed, (\d+) missed", done.stdout)
    assert reports, done.stdout
    for reused, _, missed in reports:
        assert int(reused) > 300
        assert missed == "0"
