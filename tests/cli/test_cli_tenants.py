"""The command line with tenants: each has its documents, answers and figures to itself."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from test_cli import Cli, cli, model, store  # noqa: F401 (fixtures)

from cachetune_store import ChunkStore

OURS, THEIRS = "The spare key is under the blue mat.", "The spare key is inside the red lamp."


def hashed(tenant: str) -> str:
    return hashlib.sha256(tenant.encode()).hexdigest()[:12]


@pytest.fixture
def shared(cli: Cli, model: Path, store: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A store with a document "key.txt" of tenant a, one of tenant b, and one without a tenant."""
    for name, texts in (("a", [OURS]), ("b", [THEIRS, "It is heavy."]), ("", ["No tenant's text."])):
        folder = tmp_path / f"docs-{name}"
        folder.mkdir()
        (folder / "key.txt").write_text("\n\n".join(texts))
        whose = ["--tenant", name] if name else []
        cli("precompute", folder, "-m", model, "-s", store, *whose)
    return store


def ask(cli: Cli, model: Path, store: Path, *arguments: object) -> Any:  # noqa: F811
    return cli("ask", "Where is the spare key?", "-m", model, "-s", store, "-n", 2, "--json", *arguments).json


def test_each_tenant_asks_over_its_own(cli: Cli, model: Path, shared: Path) -> None:  # noqa: F811
    with ChunkStore(shared) as kv:
        keys = {name: {str(key) for info in kv.documents(tenant=name) for key in info.chunks} for name in ("a", "b")}
    assert keys["a"]
    assert keys["b"]
    for name in ("a", "b"):
        for arguments in ([], ["-d", "key.txt"]):
            found = ask(cli, model, shared, "--tenant", name, *arguments)
            assert {passage["key"] for passage in found["passages"]} == keys[name]
            assert found["report"]["missed"] == 0
    # Of a tenant without documents, nothing is there, and nothing tells that others have some.
    done = cli("ask", "Where is the spare key?", "-m", model, "-s", shared, "--tenant", "c", code=2)
    assert "no passage in the store" in done.err
    done = cli("ask", "Where?", "-m", model, "-s", shared, "--tenant", "c", "-d", "key.txt", code=2)
    assert "no document 'key.txt' of tenant 'c' in the store. 'cachetune stats" in done.err


def test_stats_by_tenant(cli: Cli, shared: Path) -> None:  # noqa: F811
    whole = cli("stats", "-s", shared, "--json").json
    by_name = {each["tenant"]: each for each in whole["tenants"]}
    assert by_name.keys() == {hashed("a"), hashed("b"), ""}
    assert [each["documents"] for each in whole["tenants"]] == [1, 1, 1]
    for total in ("documents", "chunks", "bytes"):
        assert sum(each[total] for each in whole["tenants"]) == whole[total]
    own = cli("stats", "-s", shared, "--tenant", "a", "--documents", "--json").json
    assert {name: own[name] for name in ("documents", "chunks", "bytes")} == {
        name: by_name[hashed("a")][name] for name in ("documents", "chunks", "bytes")
    }
    assert own["tokens"] == len(OURS)
    assert [group["tenant"] for group in own["groups"]] == [hashed("a")]
    assert [each["id"] for each in own["document_list"]] == ["key.txt"]
    assert "tenants" not in own
    assert "lifetime" not in own
    shown = cli("stats", "-s", shared).out
    assert hashed("b") in shown
    assert "(none)" in shown
    shown = cli("stats", "-s", shared, "--tenant", "a").out
    assert ", tenant 'a': 1 document, 1 chunk, 36 tokens, " in shown
    assert hashed("b") not in shown
    assert cli("stats", "-s", shared, "--tenant", "c", "--json").json["chunks"] == 0
    assert cli("stats", "-s", shared, "--tenant", "", "--json").json["documents"] == 1


def test_removing_takes_a_tenants_own(cli: Cli, model: Path, shared: Path) -> None:  # noqa: F811
    assert "give the ids of the documents" in cli("remove", "-s", shared, code=2).err
    assert "give the ids of the documents" in cli("remove", "key.txt", "--all", "-s", shared, code=2).err
    cli("remove", "key.txt", "-s", shared, "--tenant", "a")
    assert "no document 'key.txt' of tenant 'a'" in cli("remove", "key.txt", "-s", shared, "--tenant", "a", code=2).err
    with ChunkStore(shared) as kv:
        assert {each.tenant: each.documents for each in kv.tenants()} == {"b": 1, "": 1}
    # A passage that only a question brought is the tenant's as well, though no document holds it.
    Path(shared.parent, "note.txt").write_text("Some passage of b's.")
    ask(cli, model, shared, "--tenant", "b", "--chunk-file", shared.parent / "note.txt")
    with ChunkStore(shared) as kv:
        before = {each.tenant: each.chunks for each in kv.tenants()}
    assert before == {"b": 2, "": 1}
    removed = cli("remove", "--all", "--tenant", "b", "-s", shared, "--json").json
    assert [each["id"] for each in removed["removed"]] == ["key.txt"]
    assert removed["bytes"] > removed["removed"][0]["bytes"]
    with ChunkStore(shared) as kv:
        assert [each.tenant for each in kv.tenants()] == [""]
    assert ask(cli, model, shared, "-d", "key.txt")["report"]["missed"] == 0


def test_another_tenants_store_is_no_mismatch(cli: Cli, model: Path, store: Path, tmp_path: Path) -> None:  # noqa: F811
    """Whatever model another tenant uses, one may begin a corpus of one's own on the same store."""
    from test_cli import save_model

    (tmp_path / "text.txt").write_text("Some text of one's own.")
    cli("precompute", tmp_path / "text.txt", "-m", model, "-s", store, "--tenant", "a")
    other = save_model(tmp_path / "other", seed=1)
    command = ["precompute", tmp_path / "text.txt", "-m", other, "-s", store]
    assert cli(*command, "--tenant", "b", "--json").json["chunks"] == 1
    assert "was made with another model" in cli(*command, "--tenant", "a", code=2).err
