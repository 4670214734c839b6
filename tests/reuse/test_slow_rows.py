"""Rows from disk: how soon others may have the disk."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import torch
from tiny import llama, tokenizer

from cachetune_rag import CacheTune, Document
from cachetune_rag.concurrency.deadline import DeadlinePool
from cachetune_rag.reuse.layer_loader import LayerLoader
from cachetune_rag.reuse.source import Source

TEXT = "The lighthouse was built in 1871 by three brothers."


def test_the_disk_is_free_once_all_rows_are_read_though_a_selector_has_only_looked_at_them(tmp_path: Path) -> None:
    """What looks through all layers has read all rows, and their others are put in place only while the model computes."""
    with CacheTune(llama(layers=4), tokenizer(), tmp_path, host_budget=0) as engine:
        engine.precompute([Document("a", [TEXT])])
        reader = engine.store.open(engine.runtime.assembler.key(tuple(engine.prompts.encode(TEXT))))
        assert reader is not None
        rows, free = reader.layout.tokens, []
        with closing(DeadlinePool(None)) as pool, reader:
            buffers = engine.adapter.new_buffers(rows)
            with closing(LayerLoader(engine.adapter, [Source(reader, 0, rows)], buffers, pool)) as loader:
                for layer in range(4):
                    if layer == 1:
                        loader.narrow(torch.arange(rows) % 2 == 0)
                    loader.load_seen(layer)
                loader.sources_are_final(lambda: free.append(True))
                assert free
                for layer in range(4):
                    loader.load(layer)
                assert len(free) == 1
