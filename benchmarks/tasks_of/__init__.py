"""The benchmark of tasks (`benchmarks/tasks.py`, docs/quality-tasks.md): prompts with one right answer, and how many right answers reuse keeps."""
