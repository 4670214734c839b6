"""One of two processes that load tiny models as vLLM divides them, without an engine. Run as a program; prints a line of JSON for each model.

python -m tests.vllm.divided_process RANK RENDEZVOUS FOLDER...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


def tried(folder: Path, packed: bool) -> dict[str, object]:
    """What becomes of one model: how far its logits are from transformers', or why it is refused."""
    from transformers import AutoModelForCausalLM
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import get_tp_group
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    from cachetune_rag.errors import CacheTuneError
    from cachetune_rag.runtime import Runtime
    from cachetune_vllm.divided_heads import DividedHeads
    from cachetune_vllm.divided_layers import kv_heads_of
    from cachetune_vllm.served_check import check_served
    from cachetune_vllm.served_fingerprint import config_of
    from cachetune_vllm.served_model import served_model
    from tests import families, tiny
    from tests.vllm.conftest import plain_or_packed

    # Eager, which also caps scores where the model wants that.
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    config = EngineArgs(
        model=str(folder), dtype="float32", enforce_eager=True, max_model_len=2048, tensor_parallel_size=2
    ).create_engine_config()
    with set_current_vllm_config(config), plain_or_packed(packed):
        torch.accelerator.empty_cache = lambda: None  # it raises without an accelerator
        model = get_model(vllm_config=config)
    hf_config = config_of(config.model_config)
    heads = DividedHeads(get_tp_group(), kv_heads_of(hf_config.get_text_config(decoder=True)))
    try:
        served = served_model(model, hf_config, torch.float32, torch.device("cpu"), heads)
        check_served(model, served, config)
        ids = torch.tensor([families.random_ids(60, seed=1)])
        with torch.no_grad():
            off = (served.model(input_ids=ids).logits - reference(input_ids=ids).logits).abs().max()
        engine = Runtime(served.model, tiny.tokenizer(), None, fingerprint="f", heads=heads)
        stored = engine.adapter.stored_layers[0].heads
        engine.close()
    except CacheTuneError as error:
        return {"refused": str(error)}
    return {"form": served.form, "off": float(off), "stored": stored}


def main(rank: int, rendezvous: str, folders: list[str]) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=folders[0], dtype="float32", enforce_eager=True, max_model_len=2048, tensor_parallel_size=2
    ).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(2, rank, f"file://{rendezvous}", rank, "gloo")
        ensure_model_parallel_initialized(2, 1)
    for folder in folders:
        for packed in (False, True):
            print(json.dumps({"name": Path(folder).name, "packed": packed, **tried(Path(folder), packed)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
