"""A server computes in the number format of the stored chunks, and says what stands in the way where it can use none. None of it needs vLLM."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shared_places import Place
from typer.testing import CliRunner

from cachetune_rag import CacheTune
from cachetune_store import ChunkStore, Namespace
from cachetune_vllm.serve import app
from cachetune_vllm.settings import ServerSettings
from cachetune_vllm.stored import why_unusable
from tests import tiny

TEXT = "The lighthouse was built in 1871 by three brothers, who had come from the mainland with one boat and two sheep."


def fill(store: Path, dtype: torch.dtype, text: str = TEXT, tenant: str = "") -> Namespace:
    """Store a text as a model of this number format computes it; returns the namespace of its key."""
    with CacheTune(tiny.llama().to(dtype), tiny.tokenizer(), store, tenant=tenant) as engine:
        engine.precompute([text])
        return engine.namespace


def started(store: Path | str, *options: str) -> list[str]:
    """The words of the line that `cachetune serve` would start."""
    done = CliRunner().invoke(app, ["M", "--store", str(store), "--dry-run", *options])
    assert done.exit_code == 0, done.output
    return shlex.split(done.output.splitlines()[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_serve_takes_the_number_format_of_the_stored_chunks(tmp_path: Path, dtype: torch.dtype) -> None:
    fill(tmp_path / "kv", dtype)
    words = started(tmp_path / "kv", "--port", "9")
    assert words[words.index("--dtype") + 1] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("options", [("--dtype", "float16"), ("--dtype=float16",), ("--config", "server.yaml")])
def test_serve_leaves_a_number_format_that_is_given(tmp_path: Path, options: tuple[str, ...]) -> None:
    fill(tmp_path / "kv", torch.float32)
    assert "float32" not in started(tmp_path / "kv", *options)


def test_serve_leaves_the_number_format_to_vllm_where_the_store_does_not_say(tmp_path: Path) -> None:
    assert "--dtype" not in started(tmp_path / "missing")
    fill(tmp_path / "kv", torch.float32)
    assert "--dtype" not in started(tmp_path / "kv", "--tenant", "another")
    fill(tmp_path / "kv", torch.bfloat16, f"{TEXT} And a dog.")
    assert "--dtype" not in started(tmp_path / "kv")


def test_a_server_says_why_no_chunk_can_be_used(tmp_path: Path) -> None:
    made = fill(tmp_path / "kv", torch.float32, tenant="a")
    with ChunkStore(tmp_path / "kv") as store:
        assert "start it with --dtype float32" in why_unusable(store, replace(made, dtype="bfloat16", model="f" * 64))
        assert "with --dtype bfloat16" in why_unusable(store, replace(made, dtype="bfloat16", model="f" * 64))
        assert "another model" in why_unusable(store, replace(made, model="f" * 64))
        assert "another tokenizer" in why_unusable(store, replace(made, tokenizer="f" * 64))
        assert "lead_in" in why_unusable(store, replace(made, lead_ins=((1, 2),)))
        assert "nothing is stored" in why_unusable(store, replace(made, tenant="b"))


def test_a_folder_that_is_no_store_is_refused_before_the_server_starts(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text("not one")
    done = CliRunner().invoke(app, ["M", "--store", str(tmp_path), "--dry-run"])
    assert done.exit_code == 2
    assert "store.json" in done.output


def test_serve_opens_a_store_with_its_key_and_names_where_the_key_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("5f" * 32)
    monkeypatch.setenv("SOME_KEY", "5f" * 32)
    monkeypatch.chdir(tmp_path)
    with CacheTune(tiny.llama(), tiny.tokenizer(), tmp_path / "kv", store_key=tmp_path / "key") as engine:
        engine.precompute([TEXT])
    for given, settled in (("key", str(tmp_path / "key")), ("env:SOME_KEY", "env:SOME_KEY")):
        words = started(tmp_path / "kv", "--store-key", given)
        assert "--dtype" in words
        config = json.loads(words[words.index("--kv-transfer-config") + 1])
        assert config["kv_connector_extra_config"]["store_key"] == settled


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("options", [(), ("--dtype", "float32")])
def test_serve_refuses_a_wrong_key_before_vllm_starts(
    tmp_path: Path, encrypted: bool, options: tuple[str, ...]
) -> None:
    for name, digits in (("key", "5f"), ("wrong", "6e")):
        (tmp_path / name).write_text(digits * 32)
    path = tmp_path / "kv"
    with CacheTune(tiny.llama(), tiny.tokenizer(), path, store_key=tmp_path / "key", encrypt=encrypted) as engine:
        engine.precompute([TEXT])
    started(path, "--store-key", str(tmp_path / "key"), *options)
    for given, said in (((), "none is given"), (("--store-key", str(tmp_path / "wrong")), "with another key")):
        refused = CliRunner().invoke(app, ["M", "--store", str(path), *given, *options])
        assert refused.exit_code == 2
        assert said in refused.output
    if not encrypted:
        refused = CliRunner().invoke(
            app, ["M", "--store", str(path), "--store-key", str(tmp_path / "key"), "--encrypt"]
        )
        assert refused.exit_code == 2
        assert "encrypt" in refused.output


@pytest.mark.parametrize("behind", [False, True], ids=["the store itself", "behind a folder"])
def test_serve_takes_a_place_that_machines_share(folder: Place, tmp_path: Path, behind: bool) -> None:
    with CacheTune(tiny.llama().to(torch.bfloat16), tiny.tokenizer(), folder.url) as engine:
        engine.precompute([TEXT])
    options = ("--remote", folder.url, "--remote-codec", "int8") if behind else ()
    words = started(tmp_path / "kv" if behind else folder.url, *options)
    assert words[words.index("--dtype") + 1] == "bfloat16", "it is found there"
    settings = json.loads(words[words.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]
    assert ServerSettings.of(settings).place == {
        "path": str(tmp_path / "kv") if behind else folder.url,
        "remote": folder.url if behind else None,
        "remote_codec": "int8" if behind else None,
        "store_key": None,
        "encrypt": None,
    }
    refused = CliRunner().invoke(app, ["M", "--store", "ftp://host/x", "--dry-run"])
    assert refused.exit_code == 2
    assert "use the URL of a bucket" in refused.output


def test_a_line_that_is_only_shown_may_be_for_another_machine(tmp_path: Path) -> None:
    key = ("--store-key", str(tmp_path / "a key that only the server has"))
    done = CliRunner().invoke(app, ["M", "--store", str(tmp_path / "kv"), *key, "--dry-run", "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "kv").exists()


@pytest.mark.parametrize("option", ["--store", "--remote"])
def test_the_line_that_serve_shows_has_no_password(tmp_path: Path, option: str) -> None:
    store = () if option == "--store" else ("--store", str(tmp_path / "kv"))
    url = "valkey://user:it's pass@word@localhost:6379/prefix"
    done = CliRunner().invoke(app, ["M", *store, option, url, "--dry-run", "--dtype", "float32"])
    assert done.exit_code == 0
    assert "valkey://localhost:6379/prefix" in done.output
    assert "user" not in done.output
    assert "word" not in done.output
