"""What the benchmark of host time notes is there, in this vLLM and in the connector."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from served.choosing import CALLS, SPANS
from served.host_steps import CORE, FRONT, owner_of

PLACES = [*(step.place for step in (*FRONT, *CORE)), *SPANS.values(), *CALLS.values()]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])
def test_every_step_has_its_function(place: tuple[str, str]) -> None:
    owner, name = owner_of(place)
    assert callable(getattr(owner, name, None))
