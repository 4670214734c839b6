"""uv is told what pip is told: `tools/run_uv.py`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "tools" / "run_uv.py"

CONFIG = """
[global]
index-url = https://mirror.example/simple
extra-index-url =
    https://one.example/simple
    https://two.example/simple
find-links =
    /wheels/a
    /wheels/b
timeout = 5
[install]
timeout = 60
[download]
proxy = http://not-for-installing.example
"""


@pytest.fixture
def environment() -> Callable[[str, dict[str, str]], dict[str, str]]:
    spec = importlib.util.spec_from_file_location("run_uv", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: Callable[[str, dict[str, str]], dict[str, str]] = module.environment
    return made


def listed(folder: Path, **variables: str) -> str:
    """What pip itself says of its settings."""
    (folder / "pip.conf").write_text(CONFIG)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        env={**clean, **variables, "PIP_CONFIG_FILE": str(folder / "pip.conf")},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_uv_is_told_what_pip_is_told(
    environment: Callable[[str, dict[str, str]], dict[str, str]], tmp_path: Path
) -> None:
    told = environment(
        listed(tmp_path, PIP_INDEX_URL="https://nearer.example/simple", PIP_CERT="/a.pem"), {"UV_FIND_LINKS": "/mine"}
    )
    assert told["UV_DEFAULT_INDEX"] == "https://nearer.example/simple", "a variable goes before a file"
    assert told["UV_INDEX"] == "https://one.example/simple https://two.example/simple"
    assert told["UV_INDEX_STRATEGY"] == "unsafe-best-match"
    assert told["UV_HTTP_TIMEOUT"] == "60", "what is set for installing goes before what is set for all"
    assert told["SSL_CERT_FILE"] == "/a.pem"
    assert told["UV_FIND_LINKS"] == "/mine", "uv's own variable has the last word"
    assert "HTTPS_PROXY" not in told


def test_several_folders_of_wheels(
    environment: Callable[[str, dict[str, str]], dict[str, str]], tmp_path: Path
) -> None:
    assert environment(listed(tmp_path), {})["UV_FIND_LINKS"] == "/wheels/a,/wheels/b"


def test_without_settings_only_pythons_are_not_fetched(
    environment: Callable[[str, dict[str, str]], dict[str, str]],
) -> None:
    assert environment("", {}) == {"UV_PYTHON_DOWNLOADS": "never", "UV_LINK_MODE": "copy"}
