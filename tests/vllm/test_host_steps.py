"""What the benchmark of host time notes is there, in this vLLM and in the connector."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from served.choosing import CALLS, SPANS
from served.host_steps import CORE, FRONT, Step, owner_of

WATCHED = [Step(name, True, place) for name, place in {**SPANS, **CALLS}.items()]


@pytest.mark.parametrize("step", [*FRONT, *CORE, *WATCHED], ids=lambda step: step.name)
def test_every_step_has_its_function(step: Step) -> None:
    owner, name = owner_of(step)
    assert callable(getattr(owner, name, None))
