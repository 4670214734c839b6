"""Engines, real documents and real embeddings for the adapters' tests."""

from __future__ import annotations

import pydoc_data.topics
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engines import EngineMaker, Retriever

from cachetune_rag import CacheTune
from cachetune_rag.model.loading import load_model

TOPICS = ("assert", "break", "continue", "del", "global", "nonlocal", "pass", "return")

LAYERS = 5
"""Layers of the real model that tests of pipelines run, of its 30."""


@pytest.fixture(scope="session")
def documents() -> dict[str, str]:
    """Topics of Python's language reference: a few paragraphs each."""
    return {name: re.sub(r"\n{3,}", "\n\n", pydoc_data.topics.topics[name]).strip()[:1400] for name in TOPICS}


@pytest.fixture(scope="session")
def embed() -> Callable[[list[str]], Any]:
    """Texts to unit vectors, float32 [texts, 256]."""
    return Retriever(["."]).embed


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> tuple[Any, Any]:
    """The real tokenizer, chat template and first layers, which take a sixth of the time: what is tested is how a framework and the
    engine work together, against the engine's own answer. The quickstarts (`test_quickstarts.py`) run the whole model.
    """
    model, tokenizer = load_model(smollm2_path, device="cpu")
    del model.model.layers[LAYERS:]
    model.config.num_hidden_layers = LAYERS
    return model, tokenizer


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    """Prompts are short here: more threads gain little, and lose a lot where something else runs on the machine."""
    torch.set_num_threads(1)


@pytest.fixture
def engines(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[EngineMaker]:
    """Makes engines on the real model where a test is marked so, on a tiny one elsewhere; closes them afterwards."""
    if "real_model" in request.keywords:
        model, tokenizer = request.getfixturevalue("smollm2")
    else:
        model, tokenizer = tiny.llama(max_positions=8192), tiny.tokenizer()
    maker = EngineMaker(model, tokenizer, tmp_path)
    yield maker
    maker.close()


@pytest.fixture
def engine(engines: EngineMaker) -> CacheTune:
    return engines()
