"""cachetune-rag: reuse the KV cache of retrieved chunks and recompute only what matters."""
