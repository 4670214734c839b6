"""Tests that run inside real vLLM: skipped as a whole where it isn't installed.

A start of vLLM takes some ten seconds, so one stays up for all tests that want the same model; another model ends it.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cachetune_rag.runtime import Runtime
from tests.vllm.models import row_of, save_tiny

_vllm = importlib.util.find_spec("vllm")
if _vllm is None or _vllm.origin is None:  # without it, this folder itself is found
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        DO_NOT_TRACK="1",
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
    )

MAX_MODEL_LEN = 2048


@dataclass
class TinyVLLM:
    """One vLLM on a tiny float32 model, in this process.

    Attributes:
        folder: the model's files, as `save_pretrained` writes them.
        llm: vLLM on them.
        reference: the same files as `from_pretrained` loads them, in memory of its own.
        warmed: what the connector's engine was made ready for at the start, call by call.
    """

    folder: Path
    llm: Any
    reference: Any
    warmed: Sequence[tuple[Any, ...]] = ()

    @property
    def model(self) -> Any:
        """The model inside vLLM's worker."""
        return self.llm.apply_model(lambda model: model)[0]

    def greedy(self, prompts: list[list[int]], tokens: int, **options: Any) -> list[list[int]]:
        """vLLM's own greedy tokens behind each prompt of token ids."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **options)
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        return [list(out.outputs[0].token_ids) for out in self.llm.generate(asked, params, use_tqdm=False)]

    @torch.no_grad()
    def reference_tokens(self, ids: list[int], tokens: int) -> list[int]:
        """transformers' greedy tokens behind a prompt, from a model that has nothing to do with vLLM."""
        made: list[int] = []
        while len(made) < tokens:
            made.append(int(self.reference(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax()))
        return made

    def last_logprobs(self, ids: list[int], count: int = 20) -> dict[int, float]:
        """The likeliest tokens behind a prompt and their log probabilities, by vLLM."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, logprobs=count)
        out = self.llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0]
        return {token: entry.logprob for token, entry in out.outputs[0].logprobs[0].items()}


@dataclass
class Loaded:
    """A tiny model as vLLM loads it, without an engine.

    Attributes:
        folder, reference: as of `TinyVLLM`.
        model: vLLM's model.
        config: vLLM's configuration.
    """

    folder: Path
    model: Any
    config: Any
    reference: Any


@contextmanager
def plain_or_packed(packed: bool) -> Iterator[None]:
    """While open, vLLM packs the weights that it loads, as it does on a CPU, or leaves them as they are, as it does on a GPU."""
    import vllm._custom_ops as ops

    known = ops._supports_onednn
    ops._supports_onednn = packed and known
    try:
        yield
    finally:
        ops._supports_onednn = known


def _known_here(folder: Path) -> None:
    """Give vLLM the class of a saved model. To look at a class that it only knows by name, vLLM starts a process that imports all of it: seconds."""
    from vllm import ModelRegistry

    for architecture in json.loads((folder / "config.json").read_text())["architectures"]:
        if (named := ModelRegistry.models.get(architecture)) is not None:
            ModelRegistry.register_model(architecture, named.load_model_cls())


class _Starts:
    """Starts vLLM, and keeps the last one up."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._key: Any = None
        self._tiny: TinyVLLM | None = None
        self._distributed = False  # for models without an engine
        self._config: Any = None
        self._references: dict[tuple[str, str], Any] = {}

    def get(self, family: str, *, packed: bool, dtype: str, options: dict[str, Any]) -> TinyVLLM:
        key = (family, packed, dtype, repr(sorted(options.items())))
        if self._tiny is None or key != self._key:
            self.end()
            self._tiny, self._key = self._start(family, packed, dtype, options), key
        return self._tiny

    def _start(self, family: str, packed: bool, dtype: str, options: dict[str, Any]) -> TinyVLLM:
        from vllm import LLM
        from vllm.engine.arg_utils import EngineArgs

        folder = self._save(family)
        settings: dict[str, Any] = {
            "dtype": dtype,
            "enforce_eager": True,
            "max_model_len": MAX_MODEL_LEN,
            "max_num_seqs": 8,
            "disable_log_stats": True,
            "seed": 0,
        }
        if torch.cuda.is_available():
            settings["gpu_memory_utilization"] = 0.2  # what an earlier start took may not be free again
        config = EngineArgs(model=str(folder), dtype=dtype, enforce_eager=True).create_engine_config()
        reference = self._reference(family, dtype, folder, config)
        with plain_or_packed(packed), pytest.MonkeyPatch.context() as patch:
            # vLLM looks through all modules, and stumbles over this one, which an earlier start may have loaded.
            patch.delitem(sys.modules, "llvmlite.binding.ffi", raising=False)
            warmed: list[tuple[Any, ...]] = []
            warmup = Runtime.warmup
            patch.setattr(Runtime, "warmup", lambda engine, *given: (warmed.append(given), warmup(engine, *given)))
            llm = LLM(model=str(folder), **(settings | options))
        return TinyVLLM(folder, llm, reference, warmed)

    def load(
        self,
        family: str = "llama",
        *,
        packed: bool,
        dtype: str = "float32",
        folder: Path | None = None,
        workers: int = 1,
    ) -> Loaded:
        """The family's model as vLLM loads it, and no engine around it; or that of a folder, of which there is no reference.

        Of several workers, it is what the first one loads. There are no others, so it can't be run.
        """
        from vllm.config import set_current_vllm_config
        from vllm.distributed import ensure_model_parallel_initialized, get_tp_group, init_distributed_environment
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.model_loader import get_model

        self.end()  # which groups of processes there are depends on the model
        made = folder or self._save(family)
        config = EngineArgs(
            model=str(made), dtype=dtype, enforce_eager=True, max_model_len=MAX_MODEL_LEN
        ).create_engine_config()
        reference = self._reference(family, dtype, made, config) if folder is None else None
        with set_current_vllm_config(config), plain_or_packed(packed):
            place = self._folder / "rendezvous"
            place.unlink(missing_ok=True)
            init_distributed_environment(1, 0, f"file://{place}", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            self._distributed = True
            # vLLM's worker for CPUs takes this function out for the whole process, since torch's raises without an accelerator.
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.accelerator, "empty_cache", lambda: None)
                patch.setattr(get_tp_group(), "world_size", workers)
                model = get_model(vllm_config=config)
            return Loaded(made, model, config, reference)

    def _save(self, family: str) -> Path:
        from vllm.config import set_current_vllm_config

        # Once vLLM has changed a class of transformers', its objects are made with a configuration of vLLM's at hand: any does.
        with nullcontext() if self._config is None else set_current_vllm_config(self._config):
            folder = save_tiny(family, self._folder)
        _known_here(folder)
        return folder

    def _reference(self, family: str, dtype: str, folder: Path, config: Any) -> Any:
        """Made with vLLM's configuration at hand: vLLM may have changed the class, which then asks for it."""
        from transformers import AutoModelForCausalLM
        from vllm.config import set_current_vllm_config

        self._config = config
        if (family, dtype) not in self._references:
            with set_current_vllm_config(config):
                made = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=getattr(torch, dtype), attn_implementation=row_of(family).attn
                ).eval()
            made.get_decoder().do_not_compile = True  # what the changed class asks its objects
            self._references[family, dtype] = made
        return self._references[family, dtype]

    def empty_cache(self) -> None:
        if self._tiny is not None:
            self._tiny.llm.reset_prefix_cache()

    def end(self) -> None:
        """End the one that is up, and leave the group of processes (of one) that vLLM has made."""
        from vllm.distributed import cleanup_dist_env_and_memory

        if self._tiny is not None:
            self._tiny.llm.llm_engine.engine_core.shutdown()
        elif not self._distributed:
            return
        self._tiny = self._key = None
        gc.collect()
        cleanup_dist_env_and_memory()
        self._distributed = False


LONGEST = ("test_served_real_model.py", "test_server.py")
"""The files that take minutes. Started behind all others, one would keep all but one process waiting."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first. pytest-xdist keeps to this order with `--no-loadscope-reorder` only: it would go by the number of tests."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def _starts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Starts]:
    starts = _Starts(tmp_path_factory.mktemp("models"))
    yield starts
    starts.end()


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    """A start of vLLM 0.26 that fails leaves its own default dtype behind. Random models that later tests make would then have other weights than those of earlier ones, whose
    chunks they reuse."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def no_pages_of_another_test(_starts: _Starts) -> None:
    """Empty vLLM's prefix cache: a prompt's first pages may have been computed for another test, and are then used as they are."""
    _starts.empty_cache()


@pytest.fixture(scope="session")
def load_tiny(_starts: _Starts) -> Callable[..., Loaded]:
    """Loads the tiny model of a family (see `tests/vllm/models.py`) as vLLM does, without starting an engine: a second or so."""
    return _starts.load


@pytest.fixture(scope="session")
def tiny_vllm(_starts: _Starts) -> Callable[..., TinyVLLM]:
    """Starts vLLM on a tiny model of a family (see `tests/vllm/models.py`), or gives the one that is up.

    `packed=False` lets vLLM keep plain weights, as it does on a GPU; by default it packs them, as it does on a CPU. All other arguments
    are vLLM's own (`kv_transfer_config=...`).
    """

    def get(family: str = "llama", *, packed: bool = True, dtype: str = "float32", **options: Any) -> TinyVLLM:
        return _starts.get(family, packed=packed, dtype=dtype, options=options)

    return get


@contextmanager
def heard(module: str, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """While open, pytest hears what this module logs: vLLM's loggers hand nothing on to the root, where it listens."""
    log = logging.getLogger(f"vllm.cachetune_vllm.{module}")
    log.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger=log.name):
            yield
    finally:
        log.removeHandler(caplog.handler)
