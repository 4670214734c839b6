"""What happens once, when the server starts: a worker's engine is made, and the scheduler learns what to look for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from cachetune_rag.errors import CacheTuneError, UnsupportedModelError
from cachetune_rag.model.heads import ALL_HEADS, Heads
from cachetune_rag.reuse.prompt_room import PromptRoom
from cachetune_rag.reuse.worth import LEAST_REUSED, LEAST_REUSED_ON_CPU
from cachetune_rag.runtime import Runtime
from cachetune_rag.selection import get_selector, selector_names
from cachetune_store import StoreError
from cachetune_vllm.divided_heads import DividedHeads, HeadsInTurns
from cachetune_vllm.divided_layers import kv_heads_of
from cachetune_vllm.engines import Engines
from cachetune_vllm.logs import logger
from cachetune_vllm.messages import Hello
from cachetune_vllm.pace import pace_of
from cachetune_vllm.pages import LEAST_READ, Pages
from cachetune_vllm.prompt_memory import prompt_memory
from cachetune_vllm.served_check import check_served
from cachetune_vllm.served_fingerprint import config_of
from cachetune_vllm.served_model import ServedModel, served_model
from cachetune_vllm.settings import ServerSettings
from cachetune_vllm.warm_up import warm_up
from cachetune_vllm.worker import ReuseWorker
from cachetune_vllm.worker_model import attention_layers, model_around

if TYPE_CHECKING:
    from vllm.config import VllmConfig

DRAFTS_FROM_TEXT = ("ngram", "ngram_gpu", "suffix")
"""Methods of speculative decoding that draft tokens from the text so far, without a model of their own."""

_log = logger(__name__)


@dataclass
class Started:
    """What was made for a worker when the server started.

    Attributes:
        hello: what the scheduler is told.
        worker: puts prompts together; None if nothing is reused.
        engines: the engines that the worker uses.
        warm_up: makes them ready for requests; None once that is done, or where nothing is reused.
    """

    hello: Hello
    worker: ReuseWorker | None = None
    engines: Engines | None = None
    warm_up: Callable[[], None] | None = None

    def ready(self) -> Hello:
        """vLLM is about to answer requests: make the engine ready for them as well, once. Returns what the scheduler is told."""
        warm_up, self.warm_up = self.warm_up, None
        if warm_up is not None:
            warm_up()
        return self.hello

    def close(self) -> None:
        """End the thread, then close engines and store."""
        if self.worker is not None:
            self.worker.close()
        if self.engines is not None:
            self.engines.close()


def start_worker(config: VllmConfig, settings: ServerSettings, page_count: int) -> Started:
    """Make the engine of a worker whose model is loaded.

    If the model can't be served, the server goes on without reuse, and says why.

    Args:
        config: vLLM's.
        settings: the server's.
        page_count: pages that vLLM's cache has.

    Raises:
        StoreError: the store can't be opened.
    """
    try:
        refusal = unsupported(config)
        if refusal is not None:
            return Started(_refusing(refusal, refusal))
        hf_config = config_of(config.model_config)
        heads = heads_of(config, hf_config)
        # Workers that share a model succeed or are refused together, after each step.
        layers, around, served = heads.together(partial(_served, config, hf_config, heads))
        heads.together(partial(check_served, around, served, config))
        engines = heads.together(partial(Engines, served, tokenizer_of(config), settings, config.model_config))
        memory = heads.together(partial(prompt_memory, config, settings, engines.default))
        most_bytes = min(heads.tell(memory), key=lambda most: -1 if most is None else most)
        # A bound needs what was calibrated: better no reuse, with the reason at the start, than a warning with every request.
        heads.together(
            partial(
                engines.default.admission.config,
                settings.selector,
                settings.ratio,
                settings.max_kl,
                settings.min_top1,
            )
        )
    except StoreError:
        raise
    except UnsupportedModelError as error:
        return Started(_refusing(str(error), str(error)))
    except CacheTuneError as error:
        # Such an error may name files, which are nobody's business who sends requests.
        return Started(_refusing(str(error), "what it was started with can't be used."))
    engine = engines.default
    hello = Hello(
        engine.lead_ins.base,
        choose_lead_ins=settings.lead_in == "auto",
        separator_ids=engine.prompts.separator_ids,
        vocabulary=engine.adapter.config.vocab_size,
        max_positions=engine.adapter.max_positions,
        most_tokens=None if most_bytes is None else most_bytes // engine.adapter.row_bytes,
        ratios=settled_ratios(engine),
        least_reused=LEAST_REUSED if engine.adapter.device.type == "cuda" else LEAST_REUSED_ON_CPU,
        process=os.getpid() if engine.adapter.device.type == "cpu" else None,
    )
    least_read = LEAST_READ if engine.adapter.device.type == "cuda" else 1
    pages = Pages(layers, config.cache_config.block_size, page_count, least_read)
    if config.cache_config.enable_prefix_caching:
        readable = pages.learn_to_read(engine.adapter.new_buffers(pages.block_size))
        pages.readable = all(heads.tell(readable))  # or workers that share a model would compute different tokens
        if not pages.readable:
            _log.info("vLLM's pages can't be read, so the beginnings of prompts that it has cached are computed again")
    # As much as a step with a prompt computes in vLLM. Two of a layer's results are added up.
    turn = 2 * config.scheduler_config.max_num_batched_tokens * len(layers)
    pace = pace_of(served, turn)
    room = PromptRoom(engine.adapter.device, most_bytes)
    worker = ReuseWorker(engines.of, pages, engine.adapter.device, served.heads, pace, engine.model.lock, room)
    longest = config.model_config.max_model_len
    if hello.most_tokens is not None:
        longest = min(longest, hello.most_tokens)
    return Started(hello, worker, engines, partial(warm_up, engine, settings, longest) if longest else None)


def _refusing(why: str, told: str) -> Hello:
    """What the scheduler is told where nothing is reused: why, and what whoever sends requests is told of it."""
    return Hello(
        None,
        refusal=why,
        refusal_told=f'this server reuses no chunks: {told} The start of its log says so as well ("no chunks are reused by this server").',
    )


def settled_ratios(engine: Runtime) -> dict[str, float]:
    """What a ratio of "auto" stands for, by selector."""
    using = [name for name in selector_names() if get_selector(name).uses_ratio]
    return {name: engine.admission.config(name, "auto").ratio for name in using}


def heads_of(config: VllmConfig, hf_config: Any) -> Heads:
    """Which of the model's heads this worker has."""
    if config.parallel_config.tensor_parallel_size == 1:
        return ALL_HEADS
    from vllm.distributed.parallel_state import get_tp_group

    return DividedHeads(get_tp_group(), kv_heads_of(hf_config.get_text_config(decoder=True)))


def _served(config: VllmConfig, hf_config: Any, heads: Heads) -> tuple[list[nn.Module], nn.Module, ServedModel]:
    """vLLM's attention layers, its model, and transformers' model over the same weights."""
    layers = attention_layers(config.compilation_config.static_forward_context)
    around = model_around(layers)
    weight = next(around.parameters())
    served = served_model(around, hf_config, config.model_config.dtype, weight.device, heads, config)
    if served.blocks and (heads.shared or config.parallel_config.data_parallel_size > 1):
        raise UnsupportedModelError(
            "it is a mixture of experts that several processes compute together (--tensor-parallel-size, --data-parallel-size), which is "
            "not supported yet where vLLM packs or quantises the experts' weights."
        )
    if served.blocks and not heads.shared:
        served = replace(served, heads=(turned := HeadsInTurns()))
        for block in served.blocks:
            block.spend = turned.turns.spend
    return layers, around, served


def unsupported(config: VllmConfig) -> str | None:
    """Why a server with these options can't reuse chunks; None if it can."""
    parallel = config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        return (
            "its model is spread over a pipeline (--pipeline-parallel-size), and reuse needs all layers in each worker."
        )
    if config.model_config.runner_type != "generate":
        return "its model doesn't generate text."
    if config.model_config.enable_sleep_mode:
        return (
            "its weights may be dropped and others loaded while it runs (--enable-sleep-mode), and stored chunks belong to the weights "
            "that it started with."
        )
    speculative = config.speculative_config
    if speculative is not None and speculative.method not in DRAFTS_FROM_TEXT:
        return (
            f"a second model drafts its tokens (--speculative-config, method {speculative.method!r}), whose keys and values are not stored. "
            f"These methods need none: {', '.join(DRAFTS_FROM_TEXT)}."
        )
    return None


def tokenizer_of(config: VllmConfig) -> Any:
    """The model's tokenizer, as `cachetune precompute` loads it.

    Raises:
        CacheTuneError: there is none.
    """
    from cachetune_rag.model.loading import load_tokenizer

    model = config.model_config
    return load_tokenizer(model.tokenizer or model.model, revision=model.tokenizer_revision)
