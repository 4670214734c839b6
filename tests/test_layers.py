"""The layers point downwards only, and no framework is needed where none is named."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FRAMEWORKS = {"llama_index", "langchain_core", "langchain", "faiss"}

# Source folder -> top-level packages it may not import.
FORBIDDEN = {
    "store/cachetune_store": {"cachetune_rag", "transformers", "langchain_cachetune"} | FRAMEWORKS,
    "cachetune_rag": {"langchain_cachetune"} | FRAMEWORKS,
}


def imports(file: Path) -> set[str]:
    """Top-level packages that a file imports anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_a_lower_layer_imports_no_higher_one(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    wrong = {str(f.relative_to(ROOT)): sorted(imports(f) & FORBIDDEN[folder]) for f in files}
    assert {f: names for f, names in wrong.items() if names} == {}


def test_model_code_is_known_to_the_model_layer_alone() -> None:
    """Elsewhere transformers is used to load, to decode and for the cache type; its models' insides only in model/."""
    allowed = {
        "loading.py",
        "decoding.py",
        "generation_settings.py",
        "prefill.py",
        "state.py",
        "memory.py",
        "teacher.py",
    }
    files = [f for f in sorted((ROOT / "cachetune_rag").rglob("*.py")) if "model" not in f.parts]
    wrong = [str(f.relative_to(ROOT)) for f in files if "transformers" in imports(f) and f.name not in allowed]
    assert wrong == []


def test_the_store_and_the_engine_load_no_framework() -> None:
    code = (
        "import sys, cachetune_store, cachetune_rag\n"
        f"print(sorted(m for m in sys.modules if m.split('.')[0] in {FRAMEWORKS!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
