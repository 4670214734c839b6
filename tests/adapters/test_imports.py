"""Frameworks are extras: an error names a missing one, and the engine needs none."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r} or name in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def run(blocked: set[str], code: str) -> str:
    done = subprocess.run([sys.executable, "-c", BLOCK.format(blocked=blocked) + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("blocked", "module", "extra"),
    [
        ("llama_index.core", "llama_index.llms.cachetune", "cachetune-rag[llama-index]"),
        ("langchain_core", "langchain_cachetune", "cachetune-rag[langchain]"),
    ],
)
def test_a_missing_framework_names_its_extra(blocked: str, module: str, extra: str) -> None:
    code = f"try:\n    import {module}\nexcept ImportError as error:\n    print(error)\nelse:\n    print('imported')"
    assert f"pip install '{extra}'" in run({blocked}, code)


def test_the_engine_imports_no_framework() -> None:
    code = (
        "import pkgutil, importlib, importlib.util, cachetune_rag\n"
        "# Kernels are imported where they run; Triton comes with torch's CUDA builds.\n"
        "kernels = ('attention', 'watched_attention', 'rows', 'shift')\n"
        "left_out = () if importlib.util.find_spec('triton') else tuple(f'kernels.{name}' for name in kernels)\n"
        "for m in pkgutil.walk_packages(cachetune_rag.__path__, 'cachetune_rag.'):\n"
        "    if not m.name.endswith(('__main__', *left_out)): importlib.import_module(m.name)\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('llama_index', 'langchain_core', 'faiss')])"
    )
    assert run({"llama_index", "langchain_core"}, code).strip() == "[]"


def test_llama_index_stays_a_namespace_package() -> None:
    import llama_index
    import llama_index.llms

    assert getattr(llama_index, "__file__", None) is None
    assert getattr(llama_index.llms, "__file__", None) is None
