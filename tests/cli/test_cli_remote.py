"""Commands on a store that many machines share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shared_places import Place
from tiny import llama, tokenizer

from cachetune_rag.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    with pytest.raises(SystemExit) as exit_info:
        main([*map(str, arguments), "--json"])
    found = capsys.readouterr()
    assert (exit_info.value.code or 0) == code, found
    return json.loads(found.out) if code == 0 else found.err


def test_machines_share_what_commands_store_and_remove(
    folder: Place, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.md").write_text("To reset the lamp, hold the red button for ten seconds.")
    one, two, three = ("-s", tmp_path / "one"), ("-s", tmp_path / "two"), ("-s", tmp_path / "three")
    shared = ("--remote", folder.url)
    stored = run(capsys, "precompute", tmp_path / "text.md", "-m", model, *one, *shared, "--remote-codec", "int8")
    assert stored["chunks"] == 1
    seen = run(capsys, "stats", *two, *shared, "--documents")
    assert [each["id"] for each in seen["document_list"]] == ["text.md"]
    assert seen["remote"] == {"url": folder.url, "chunks": 1, "bytes": seen["remote"]["bytes"]}
    answer = run(capsys, "ask", "How?", "-d", "text.md", "-m", model, *two, *shared, "--max-new-tokens", 2)
    assert "remote" in json.dumps(answer)
    assert run(capsys, "precompute", tmp_path / "text.md", "-m", model, *three, *shared)["chunks"] == 0
    run(capsys, "remove", "text.md", *three, *shared)
    assert run(capsys, "stats", *one, *shared)["documents"] == 0
    assert list(folder.objects.names("chunks/")) == []


def test_the_ratio_is_tuned_for_the_shared_place(
    folder: Place, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.md").write_text("The keeper saw a ship pass by and wrote it down. " * 8)
    shared = ("-m", model, "-s", tmp_path / "kv", "--remote", folder.url)
    run(capsys, "precompute", tmp_path / "text.md", *shared)
    found = run(capsys, "tune", *shared, "--tier", "remote", "--tokens", 400, "--rounds", 1)
    assert [each["tier"] for each in found["tiers"]] == ["remote"]


def test_a_shared_place_that_can_not_be_meant_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run(capsys, "stats", "-s", tmp_path / "kv", "--remote", "ftp://host", code=2)
    assert "valkey://" in said


def test_commands_take_the_stores_key_and_change_it(
    folder: Place, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.md").write_text("To reset the lamp, hold the red button for ten seconds.")
    (tmp_path / "old.key").write_text("5f" * 32)
    monkeypatch.setenv("NEW_KEY", "6a" * 32)
    one, shared = ("-s", tmp_path / "one"), ("--remote", folder.url)
    old, new = ("--store-key", tmp_path / "old.key"), ("--store-key", "env:NEW_KEY")
    run(capsys, "precompute", tmp_path / "text.md", "-m", model, *one, *shared, *old)
    assert "none is given: give it as store_key (--store-key on the command line)" in run(
        capsys, "stats", *one, *shared, code=2
    )
    assert run(capsys, "verify", *one, *shared, *old)["ok"]
    assert run(capsys, "change-key", *one, *shared, *old, "--new-store-key", "env:NEW_KEY")["changed"]
    assert "another key" in run(capsys, "stats", *one, *shared, *old, code=2)
    refused = run(capsys, "precompute", "x", "-m", model, *one, "--ray", "local", "--store-key", "/no/key", code=2)
    assert "a file that can't be read" in refused, "before a cluster is asked"
    for place in (one, ("-s", tmp_path / "two")):
        assert run(capsys, "stats", *place, *shared, *new)["remote"]["chunks"] == 1


def test_commands_encrypt_a_store_and_erase_a_tenant(
    folder: Place, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cryptography")
    text = "To reset the lamp, hold the red button for ten seconds."
    (tmp_path / "text.md").write_text(text)
    (tmp_path / "key").write_text("5f" * 32)
    one, shared, key = ("-s", tmp_path / "one"), ("--remote", folder.url), ("--store-key", tmp_path / "key")
    precompute = ("precompute", tmp_path / "text.md", "-m", model, *shared)
    assert "give a key as well" in run(capsys, *precompute, *one, "--encrypt", code=2)
    for tenant in ("acme", "other"):
        run(capsys, *precompute, *one, *key, "--encrypt", "--tenant", tenant)
    kept = {path: path.read_bytes() for path in (tmp_path / "one" / "chunks").rglob("*.safetensors")}
    assert len(kept) == 2
    # Other commands need the key alone, also where they make the folder.
    two = ("-s", tmp_path / "two")
    asked = ("ask", "How?", "-d", "text.md", "-m", model, *two, *shared, *key, "--max-new-tokens", 2)
    for tenant in ("acme", "other"):
        run(capsys, *asked, "--tenant", tenant)
    run(capsys, "remove", "--all", "--tenant", "acme", *one, *shared, *key)
    for path, content in kept.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    # The file that came back can't be read any more, and is deleted.
    assert run(capsys, "verify", *one, *shared, *key)["checked"] == 1
    assert [path for path in kept if path.exists()] != list(kept)
    assert "no document 'text.md'" in run(capsys, *asked, "--tenant", "acme", code=2)
    run(capsys, *asked, "--tenant", "other")
    for path in tmp_path.glob("*/**/*"):
        if "one" in path.parts or "two" in path.parts or "shared" in path.parts:
            assert not path.is_file() or text.encode()[:20] not in path.read_bytes(), path
