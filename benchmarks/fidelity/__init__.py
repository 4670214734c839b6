"""The fidelity benchmark (`benchmarks/quality.py`, docs/quality.md): how far reuse is from full prefill, and how much it computes."""
