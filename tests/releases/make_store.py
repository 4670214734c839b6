"""Makes the store that later releases have to open: `python tests/releases/make_store.py`, once for a release, at its commit.

It holds one of everything that an engine leaves in a store: chunks of every codec behind chosen lead-ins, texts, documents, the note
of the lead-ins, a calibrated and a tuned ratio, a second tenant's document behind the first token, and the index. Beside it lie
the model, and what the engine answered. docs/format.md says when it is made.
"""

from __future__ import annotations

import json
import random
import string
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny import tokenizer

from cachetune_rag import CacheTune, Document, __version__

DATA = Path(__file__).parent / "data"
TENANT = "acme"
QUERY = "What was seen?"
SELECTOR = "frequency"
RATIOS = {"none": 0.0, SELECTOR: 0.25}
"""By selector. Both are defined by what is stored alone: no later release may answer otherwise."""
CALIBRATED = "int8"
"""The codec that ratios are calibrated and tuned for."""
CODECS = ("exact", "int8", "fp8", "int4")
TOKENS = 128
"""Of a chunk. Two chunks of each codec are together just long enough to choose lead-ins from."""


def main() -> None:
    """Make it."""
    folder = DATA / __version__
    if folder.exists():
        sys.exit(
            f"{folder} exists. One that was released is to stay as it is; delete one that was not, then make it anew."
        )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=261,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=True,
        )
    ).eval()
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    expected, logits = fill(folder / "kv", model)
    save_file(logits, folder / "logits.safetensors")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    expected |= {
        "release": __version__,
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def fill(path: Path, model: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Fill the store; what it should tell and answer from then on, and the logits."""
    documents = {codec: [passage(f"{codec} {i}", TOKENS) for i in range(2)] for codec in CODECS}
    answers: dict[str, Any] = {}
    logits: dict[str, torch.Tensor] = {}
    with CacheTune(model, tokenizer(), path, host_budget=0) as engine:
        engine.precompute(Document(codec, chunks) for codec, chunks in documents.items())
        for codec, chunks in documents.items():
            engine.remove(codec)
            engine.store.codec = codec
            engine.precompute(Document(codec, chunks))
        engine.store.codec = CALIBRATED
        samples = [{"query": QUERY, "chunks": documents[CALIBRATED], "prefix": ""}]
        calibration = engine.calibrate(samples, selector=SELECTOR, ratios=(0.1, 0.5), tokens=2)
        tuning = engine.tune(samples, selector=SELECTOR, tier="disk", rounds=1).tiers[0]
        answers |= ask(engine, documents, logits)
        leads, hardware = engine.namespace.lead_ins, engine.runtime.tunings.hardware
    with CacheTune(model, tokenizer(), path, host_budget=0, tenant=TENANT, codec=CALIBRATED) as engine:
        documents[TENANT] = [passage(TENANT, TOKENS)]
        engine.precompute(Document(TENANT, documents[TENANT]))
        answers |= ask(engine, {TENANT: documents[TENANT]}, logits)
        store = engine.store
        lifetime = store.stats().lifetime["disk"]
        told = {
            "documents": documents,
            "answers": answers,
            "lead_ins": [list(lead) for lead in leads],
            "hardware": hardware,
            "calibrated": calibration.ratio,
            "tuned": {"ratio": tuning.ratio, "skipped": tuning.skipped},
            "chunks": sum(map(len, documents.values())),
            "bytes": store.stats().disk.bytes,  # type: ignore[union-attr]
            "bytes_written": lifetime.bytes_written,
        }
    return told, logits


def ask(
    engine: CacheTune, prompts: dict[str, list[str]], logits: dict[str, torch.Tensor]
) -> dict[str, dict[str, dict[str, Any]]]:
    """By document and selector: what the report counts and the answer's tokens; the logits go into `logits`."""
    answers: dict[str, dict[str, dict[str, Any]]] = {}
    for name, chunks in prompts.items():
        for selector, ratio in RATIOS.items():
            setting: dict[str, Any] = {
                "query": QUERY,
                "chunks": chunks,
                "prefix": "",
                "ratio": ratio,
                "selector": selector,
            }
            logits[f"{name}/{selector}"] = engine.prefill(**setting).logits[0].float().clone()
            answer = engine.generate(**setting, max_new_tokens=4)
            report = answer.report
            answers.setdefault(name, {})[selector] = {
                "reused": report.reused,
                "recomputed": report.recomputed,
                "missed": report.missed,
                "token_ids": list(answer.token_ids),
            }
    return answers


def passage(seed: str, length: int) -> str:
    """A text of exactly `length` characters, and as many tokens of the tiny tokenizer."""
    rng = random.Random(seed)
    words = [f"{seed}:"]
    while sum(map(len, words)) + len(words) < length:
        words.append("".join(rng.choices(string.ascii_lowercase, k=rng.randrange(2, 9))))
    return " ".join(words)[: length - 1] + "."


if __name__ == "__main__":
    main()
