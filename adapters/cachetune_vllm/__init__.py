"""Reuse inside a stock `vllm serve`: a KV connector, and what it consists of."""
