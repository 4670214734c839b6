"""Each option is declared once, and everything that names it agrees with the declaration."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
import typer.main

from cachetune_rag import CacheTune, ConfigError
from cachetune_rag.cli.app import app
from cachetune_rag.options import LOADING_NAMES, EngineArguments, EngineOptions, StoreOptions, markdown
from cachetune_store import ChunkStore

ROOT = Path(__file__).parent.parent


def test_the_stores_options_are_those_of_its_constructor() -> None:
    parameters = inspect.signature(ChunkStore.__init__).parameters
    defaults = {name: each.default for name, each in parameters.items() if name not in ("self", "path")}
    assert {each.name: each.default for each in fields(StoreOptions)} == defaults
    types = get_type_hints(ChunkStore.__init__)
    assert get_type_hints(StoreOptions, localns={"torch": torch}) == {name: types[name] for name in defaults}


def test_type_checkers_see_the_engines_options() -> None:
    assert get_type_hints(EngineArguments) == get_type_hints(EngineOptions)
    assert all(each.default is not MISSING for each in fields(EngineOptions))
    constructor = list(inspect.signature(CacheTune).parameters)
    assert constructor == ["model", "tokenizer", "store", "device", "options"]


def test_the_names_for_loading_are_those_of_from_pretrained() -> None:
    given = set(inspect.signature(CacheTune.from_pretrained).parameters) - {"model", "store", "options"}
    assert given == set(LOADING_NAMES)


def test_every_option_is_explained() -> None:
    for each in fields(EngineOptions):
        assert f"{each.name}: " in (EngineOptions.__doc__ or "")


def test_the_page_of_options_is_what_is_declared() -> None:
    assert (ROOT / "docs/options.md").read_text() == markdown() + "\n", (
        "python -m cachetune_rag.options > docs/options.md"
    )


def test_the_command_line_takes_flag_and_explanation_from_the_declaration() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = set()
    for each in fields(EngineOptions):
        if (wanted := each.metadata["cli"]) is None:
            continue
        for name in ("precompute", "tune"):
            for parameter in commands[name].params:
                if wanted.flag in parameter.opts:
                    assert (parameter.metavar, parameter.help) == (wanted.metavar, wanted.help)
                    found.add(each.name)
    assert found == {
        "codec",
        "host_budget",
        "disk_budget",
        "device_budget",
        "tenant",
        "remote",
        "remote_codec",
        "store_key",
        "encrypt",
    }


def test_an_unknown_option_is_refused_with_the_most_similar_one() -> None:
    with pytest.raises(
        ConfigError, match=r"'tennant' is no argument of CacheTune, nor of its store: did you mean 'tenant'\?"
    ):
        EngineOptions.of({"tennant": "a"})


def test_options_are_read_without_torch() -> None:
    code = "import sys, cachetune_rag.options, cachetune_rag.cli.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_command_on_a_store_takes_its_key() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    flags = {name: {flag for each in command.params for flag in each.opts} for name, command in commands.items()}
    assert {name for name, found in flags.items() if "--store" in found and "--store-key" not in found} == set()


def test_frameworks_are_given_no_key_that_they_would_show() -> None:
    from langchain_cachetune import ChatCacheTune
    from llama_index.llms.cachetune import CacheTuneLLM

    for made in (ChatCacheTune, CacheTuneLLM):
        with pytest.raises(ValueError, match="give the path of the file that holds the key, or env:NAME") as refused:
            made(model="m", engine_kwargs={"store_key": b"a secret key of thirty-two bytes"})
        assert "secret" not in str(refused.value)
        assert made(model="m", engine_kwargs={"store_key": "env:KEY"}).engine_kwargs["store_key"] == "env:KEY"
