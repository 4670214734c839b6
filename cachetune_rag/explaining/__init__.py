"""What became of a prompt, token by token and chunk by chunk, and a page that shows it. docs/explain.md says how to read it."""

from cachetune_rag.explaining.explanation import Explanation
from cachetune_rag.explaining.page import html_page

__all__ = ["Explanation", "html_page"]
