"""What each folder may import. Arrows point downwards only, no files import each other in a circle, and no framework is needed where none is named."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGINE = ROOT / "cachetune_rag"
FRAMEWORKS = {"llama_index", "langchain_core", "langchain", "faiss"}
REMOTE = {"obstore", "glide_sync"}

MODEL = ("model", "model/plain", "model/family", "model/loaded", "model/libraries")
TEXT = ("text", "text/prompts", "text/recognising")
REQUEST = ("answering", "reuse", "readahead", "chunks", "selection", *MODEL, *TEXT)
MEASURING = ("measuring", "measuring/calibration", "measuring/tuning")

# Folder, or file on the package's top floor -> what it may import besides itself. Lower ones stand first.
ALLOWED: dict[str, tuple[str, ...]] = {
    "errors": (),
    "report": (),
    "checking": ("errors",),
    "options": ("errors", "checking"),
    "concurrency": ("errors", "checking"),
    "text": ("errors", "checking", "concurrency"),
    "text/prompts": ("text", "errors", "checking"),
    "text/recognising": ("text/prompts", "errors"),
    "text/files/readers": ("errors", "checking"),
    "text/files": ("text/files/readers", "errors", "checking"),
    "kernels": (),
    "selection": ("errors", "checking", "report"),
    "model/libraries": ("errors",),
    "model/loaded": ("model/libraries", "errors"),
    "model/family": ("model/loaded", "model/libraries", "errors"),
    "model/plain": ("model/family", "model/libraries", "errors"),
    "model/cuda": ("model/plain", "model/family", "model/libraries", "kernels", "errors"),
    "model": (*MODEL[1:], "model/cuda", "kernels", "concurrency", "checking", "errors"),
    "readahead": ("concurrency", "checking"),
    "chunks": (*MODEL, *TEXT, "selection", "concurrency", "checking", "report", "errors"),
    "reuse": ("readahead", "chunks", "selection", *MODEL, "kernels", "text/prompts", "concurrency", "checking", "report", "errors"),
    "answering": (*REQUEST[1:], "concurrency", "checking", "options", "report", "errors"),
    "measuring": (*REQUEST, "concurrency", "checking", "report", "errors"),
    "measuring/calibration": ("measuring", *REQUEST, "concurrency", "checking", "report", "errors"),
    "measuring/tuning": ("measuring", *REQUEST, "concurrency", "checking", "report", "errors"),
    "explaining": ("measuring", "measuring/calibration", *REQUEST, "concurrency", "checking", "report", "errors"),
    "telemetry": ("measuring", "answering", "reuse", "concurrency", "checking", "report", "errors"),
    "runtime": ("telemetry", *MEASURING, *REQUEST, "options", "concurrency", "checking", "report", "errors"),
    "engine": ("runtime", "explaining", "telemetry", *MEASURING, *REQUEST, "options", "concurrency", "checking", "report", "errors"),
    "cli": ("engine", "runtime", "explaining", "telemetry", *MEASURING, *REQUEST, "text/files", "text/files/readers", "options", "concurrency",
            "checking", "report", "errors"),
}  # fmt: skip

# Where transformers may be imported: its models' insides are the business of model/ alone.
TRANSFORMERS = {"model", "answering/decoding.py", "answering/generation_settings.py", "measuring/teacher.py", "reuse"}


def place(file: Path) -> str:
    """The folder of a file, or the file itself on the top floor, as `ALLOWED` names it."""
    relative = file.relative_to(ENGINE)
    return relative.stem if len(relative.parts) == 1 else relative.parent.as_posix()


def module_file(name: str) -> Path | None:
    """The file of a module of the engine; None for another's."""
    path = ROOT.joinpath(*name.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if name.startswith("cachetune_rag") and file.exists():
            return file
    return None


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports anywhere in it, those for type checkers included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for name in node.names:
                inside = f"{node.module}.{name.name}"
                yield inside if module_file(inside) else node.module


def engine_files() -> list[Path]:
    """All files but the package's face, which hands on names from everywhere, and `python -m cachetune_rag`."""
    return [f for f in sorted(ENGINE.rglob("*.py")) if f.parent != ENGINE or not f.stem.startswith("__")]


def engine_imports(file: Path) -> set[Path]:
    """The engine's files that a file imports. A package's own files may be named in its `__init__`."""
    found = {target for name in imports(file) if name != "cachetune_rag" and (target := module_file(name)) is not None}
    return found - {file}


def test_the_table_names_every_folder() -> None:
    assert {place(file) for file in engine_files()} - set(ALLOWED) == set()
    assert {below for may in ALLOWED.values() for below in may} - set(ALLOWED) == set()


def test_the_table_points_downwards() -> None:
    seen: set[str] = set()
    for folder, may in ALLOWED.items():
        below = {name for name in may if not (folder == "model" and name.startswith("model/"))}
        assert below <= seen | {folder}, f"{folder} may import what stands above it: {sorted(below - seen)}"
        seen.add(folder)


@pytest.mark.parametrize("file", engine_files(), ids=lambda file: file.relative_to(ENGINE).as_posix())
def test_a_file_imports_what_its_folder_may(file: Path) -> None:
    may = {place(file), *ALLOWED[place(file)]}
    wrong = sorted(f.relative_to(ENGINE).as_posix() for f in engine_imports(file) if place(f) not in may)
    assert wrong == [], f"{place(file)} may import {sorted(may)}"


def test_no_files_import_each_other_in_a_circle() -> None:
    faces = {f for f in engine_files() if f.name == "__init__.py"}  # they hand on names of the files beside them
    graph = {file: engine_imports(file) - faces for file in engine_files() if file not in faces}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(f.relative_to(ENGINE).as_posix() for f in error.args[1]))


def test_transformers_is_known_to_the_model_layer_and_a_few_files() -> None:
    wrong = []
    for file in engine_files():
        relative = file.relative_to(ENGINE)
        if relative.parts[0] not in TRANSFORMERS and relative.as_posix() not in TRANSFORMERS:
            wrong += [relative.as_posix() for name in imports(file) if name.split(".")[0] == "transformers"]
    assert wrong == []


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("store/cachetune_store", {"cachetune_rag", "transformers", "langchain_cachetune"} | FRAMEWORKS),
        ("cachetune_rag", {"langchain_cachetune"} | FRAMEWORKS),
    ],
)
def test_the_store_and_the_engine_know_no_higher_layer(folder: str, forbidden: set[str]) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    wrong = {f.name: sorted({name.split(".")[0] for name in imports(f)} & forbidden) for f in files}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_the_store_and_the_engine_load_no_framework() -> None:
    code = (
        "import sys, cachetune_store, cachetune_rag\n"
        "cachetune_store.ChunkStore(None).close()\n"
        f"print(sorted(m for m in sys.modules if m.split('.')[0] in {FRAMEWORKS | REMOTE!r} or m.startswith('cachetune_store.remote.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['cachetune_store.remote.places']", "and nothing of a remote tier"
