"""Recognises the requests that vLLM's beam search is made of.

vLLM asks for each token of each beam by a request of its own, whose prompt is the whole text so far. Such requests are found by what vLLM
gives them, since nothing in them says what they are.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

_SERVERS_BEAM = re.compile(r"-beam-\d+(-[0-9a-f]+)?$")
"""How a server names them; vLLM's random letters may follow."""
_ENGINES_OWN = re.compile(r"\d+(-[0-9a-f]+)?$")
"""How `LLM` names requests: it counts them. A server's requests begin with their kind."""


def is_beam(request: Request) -> bool:
    """Whether a request asks for one token of a beam."""
    if _SERVERS_BEAM.search(request.request_id):
        return True
    params = request.sampling_params
    # `LLM.beam_search` is the only caller of `LLM` that gives parameters which it doesn't want copied.
    return (
        params is not None
        and params.skip_clone
        and params.max_tokens == 1
        and params.logprobs is not None
        and _ENGINES_OWN.match(request.request_id) is not None
    )
