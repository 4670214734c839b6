"""The JSON file of a run. It is written after every round, so that a run that was cut off can be continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SAME = ("gpu", "driver", "torch", "transformers", "commit")


class OtherRunError(ValueError):
    """The file has results of another run, which must not be mixed with this one's."""


class Results:
    """Groups of rows, by name.

    Args:
        path: the file; None keeps results in memory only.
        environment: the machine that is measured on.
        settings: the model's shape, and how it is measured.
        benchmark: its name.

    Raises:
        OtherRunError: the file was measured elsewhere, or with other settings.
    """

    def __init__(
        self, path: Path | None, environment: dict[str, Any], settings: dict[str, Any], benchmark: str = "ttft_gpu"
    ):
        self._path = path
        self.content: dict[str, Any] = {
            "benchmark": benchmark, "environment": environment, "settings": settings, "machine": {}, "groups": {},
        }  # fmt: skip
        if path is not None and path.exists():
            before = json.loads(path.read_text())
            for name, old, new in (
                ("settings", before["settings"], settings),
                *((k, before["environment"].get(k), environment.get(k)) for k in _SAME),
            ):
                if old != new:
                    raise OtherRunError(
                        f"{path} holds a run whose {name} was {old!r}; now it is {new!r}. Remove the file or choose another."
                    )
            self.content = before

    def done(self, name: str, rounds: int) -> bool:
        """Whether a group was measured completely."""
        return bool(self.content["groups"].get(name, {}).get("rounds", 0) >= rounds)

    def put(self, name: str, group: dict[str, Any]) -> None:
        """Add a group, and write the file."""
        self.content["groups"][name] = group
        self.write()

    def write(self) -> None:
        """Replace the file."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temp = self._path.with_name(self._path.name + ".part")
        temp.write_text(json.dumps(self.content, indent=1) + "\n")
        temp.replace(self._path)
