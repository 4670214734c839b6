"""The fidelity benchmark (`benchmarks/quality.py`, docs/quality.md): how far an answer is from full prefill's, at what compute."""
