"""Modules that moved can still be imported by their old paths."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys

import pytest

from cachetune_rag import Document


def test_a_moved_module_is_found_by_its_old_path_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="cachetune_rag.loading is cachetune_rag.model.loading now"):
        from cachetune_rag.loading import load_model  # type: ignore[import-not-found]
    from cachetune_rag.model.loading import load_model as same

    assert load_model is same


def test_every_old_path_leads_somewhere() -> None:
    code = (
        "import cachetune_rag, importlib\n"
        "for old in cachetune_rag._MOVED:\n"
        "    module = importlib.import_module(f'cachetune_rag.{old}')\n"
        "    assert module.__name__ == f'cachetune_rag.{old}'"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_was_pickled_before_the_move_can_be_read() -> None:
    document = Document("a", ["one"])
    old = pickle.dumps(document, protocol=0).replace(b"cachetune_rag.text.documents", b"cachetune_rag.documents")

    assert pickle.loads(old) == document


def test_the_program_is_found_where_earlier_releases_had_it(capsys: pytest.CaptureFixture[str]) -> None:
    from cachetune_rag.cli import main
    from cachetune_rag.cli.app import main as same

    before = signal.getsignal(signal.SIGINT)
    try:
        for each in (main, same):
            with pytest.raises(SystemExit) as ended:
                each(["--version"])
            assert not ended.value.code
            assert capsys.readouterr().out.startswith("cachetune ")
    finally:
        signal.signal(signal.SIGINT, before)
