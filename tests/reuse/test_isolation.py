"""What SECURITY.md promises: tenants don't meet, names don't leave the store, nothing planted is executed."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Document, ModelLoadError
from cachetune_store import ChunkKey, ChunkStore, Namespace, make_key
from cachetune_store.rawfile import RawFile

TEXT = "The keeper lit the lamp at dusk."


class Planted:
    """Unpickling this would leave a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


def test_a_tenant_never_sees_what_another_stored(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "kv") as store:
        a = CacheTune(llama(), tokenizer(), store, tenant="a")
        b = CacheTune(llama(), tokenizer(), store, tenant="b")
        a.precompute(Document("doc", [TEXT]))
        report = b.prefill("Who?", [TEXT]).report
        assert (report.reused, report.missed > 0, report.bytes_read) == (0, True, {})
        # Its own copy does not go with the other's.
        a.remove("doc")
        assert b.prefill("Who?", [TEXT]).report.missed == 0
        assert a.prefill("Who?", [TEXT]).report.missed > 0


def test_a_tenant_recognises_only_its_own_passages(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "kv") as store:
        CacheTune(llama(), tokenizer(), store, tenant="a").precompute(TEXT)
        b = CacheTune(llama(), tokenizer(), store, tenant="b")
        assert b.prompt_from_text(f"Read this: {TEXT} Who?").recognised == 0


def test_looking_for_anothers_chunk_does_what_looking_for_nothing_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same steps, so same time: the key of one's own tenant is looked up, and no file has that name."""
    steps: list[str] = []

    def seen(self: RawFile, path: Path, *arguments: Any) -> None:
        steps.append(f"open of a {len(path.name)} letter name")
        self._fd = -1
        raise FileNotFoundError(path)

    with ChunkStore(tmp_path / "kv", host_budget=0) as store:
        CacheTune(llama(), tokenizer(), store, tenant="a").precompute(TEXT)
        b = CacheTune(llama(), tokenizer(), store, tenant="b")
        monkeypatch.setattr(RawFile, "__init__", seen)
        found = []
        for text in (TEXT, "Never stored by anyone."):
            steps.clear()
            assert store.open(make_key(b.namespace, b.prompts.encode(text))) is None
            found.append(list(steps))
        assert found[0] == found[1] == ["open of a 76 letter name"]


NAMES = st.text(max_size=60) | st.sampled_from(
    ["../../x", "/etc/passwd", "..", ".", "", "a/b", "\0", "con", "é" * 300, "x" * 5000]
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=NAMES, tenant=NAMES)
def test_no_name_leaves_the_store(tmp_path: Path, document: str, tenant: str) -> None:
    folder = tmp_path / "around"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    key = make_key(Namespace("m", "t", "float32", ((1,),), tenant), [1, 2, 3])
    with ChunkStore(folder / "kv") as store:
        store.set_document(document, [key], tenant=tenant)
        assert [info.id for info in store.documents(tenant=tenant)] == [document]
        assert [path.name for path in folder.iterdir()] == ["kv"]
        for path in (folder / "kv" / "documents").rglob("*"):
            assert set(path.stem) <= set("0123456789abcdef")
        store.delete_document(document, tenant=tenant)


@settings(max_examples=60, deadline=None)
@given(digest=st.text(max_size=70) | st.text("0123456789abcdef/.", min_size=60, max_size=66))
def test_only_digests_name_files(digest: str) -> None:
    if len(digest) == 64 and set(digest) <= set("0123456789abcdef"):
        ChunkKey(digest)
    else:
        with pytest.raises(ValueError, match="64"):
            ChunkKey(digest)


def test_a_planted_chunk_file_is_not_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    engine = CacheTune(llama(), tokenizer(), tmp_path / "kv", host_budget=0)
    with engine:
        engine.precompute(TEXT)
        for file in (tmp_path / "kv" / "chunks").rglob("*.safetensors"):
            file.write_bytes(pickle.dumps(Planted(mark)))
        report = engine.prefill("Who?", [TEXT]).report
        assert report.missed > 0
        assert not mark.exists()


def test_a_planted_checkpoint_is_not_executed(tmp_path: Path) -> None:
    mark, folder = tmp_path / "executed", tmp_path / "model"
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Planted(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError):
        CacheTune.from_pretrained(folder)
    assert not mark.exists()


def test_code_in_a_model_folder_is_not_executed(tmp_path: Path) -> None:
    mark, folder = tmp_path / "executed", tmp_path / "model"
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    config = (folder / "config.json").read_text()
    planted = config.replace(
        "{", '{"auto_map": {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"},', 1
    ).replace('"model_type": "llama"', '"model_type": "planted"')
    (folder / "config.json").write_text(planted)
    (folder / "planted.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    with pytest.raises(ModelLoadError):
        CacheTune.from_pretrained(folder)
    assert not mark.exists()


def _check_private(top: Path) -> None:
    assert top.stat().st_mode & 0o777 == 0o700
    for path in top.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_everything_in_a_store_is_for_its_user_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with CacheTune(llama(), tokenizer(), tmp_path / "kv", host_budget=0) as engine:
            engine.precompute(Document("doc", [TEXT * 40]))
            engine.calibrate([{"query": "Who?", "chunks": [TEXT * 40]}], tokens=1)
            next((tmp_path / "kv" / "chunks").rglob("*.safetensors")).write_bytes(b"damaged")
            engine.generate("Who?", [TEXT * 40, "Never stored."], max_new_tokens=1)
            _check_private(tmp_path / "kv")  # the index's log lies beside it as long as it is open
        _check_private(tmp_path / "kv")
        names = {path.name for path in (tmp_path / "kv").iterdir()}
        assert names >= {"chunks", "claims.lock", "damaged", "documents", "index", "notes", "profiles", "store.json"}
    finally:
        os.umask(old)


def test_an_index_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    """As earlier releases left it."""
    ChunkStore(tmp_path / "kv").close()
    database = tmp_path / "kv" / "index" / "cache.db"
    database.chmod(0o644)
    with ChunkStore(tmp_path / "kv"):
        assert database.stat().st_mode & 0o777 == 0o600
