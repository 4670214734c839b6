"""What precompute calls stored is on disk, whatever this process still has in memory."""

from __future__ import annotations

import shutil
from pathlib import Path

from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Document

DOCUMENT = Document(id="d", chunks=["The quick brown fox jumps over the lazy dog.", "A second chunk of other words."])


def opened(store: Path) -> CacheTune:
    return CacheTune(llama(), tokenizer(), store, lead_in="first_token")


def used(engine: CacheTune) -> int:
    """Tokens that are found, and now are in host memory too."""
    return engine.generate("q", DOCUMENT.chunks, ratio=1.0, max_new_tokens=1).report.missed


def test_a_document_that_somebody_else_removed_is_stored_again(tmp_path: Path) -> None:
    with opened(tmp_path) as one:
        one.precompute(DOCUMENT)
        assert used(one) == 0
        with opened(tmp_path) as other:
            other.remove("d")
        first = one.precompute(DOCUMENT)
        assert first.chunks == 2
        assert str(first).startswith("1 document: 2 chunks computed, 0 stored before")
        assert one.precompute(DOCUMENT).chunks == 0
    with opened(tmp_path) as later:
        assert used(later) == 0


def test_chunks_whose_files_are_gone_are_stored_again(tmp_path: Path) -> None:
    with opened(tmp_path) as one:
        one.precompute(DOCUMENT)
        assert used(one) == 0
        shutil.rmtree(tmp_path / "chunks")
        assert one.precompute(DOCUMENT).chunks == 2
    with opened(tmp_path) as later:
        assert used(later) == 0
