"""What became of a prompt, token by token and chunk by chunk."""

from cachetune_rag.explaining.explanation import Explanation

__all__ = ["Explanation"]
