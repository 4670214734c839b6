"""What has to run on this machine, because it reads or writes its disk."""

from __future__ import annotations

from typing import Any

import ray

NODE_ID = "ray.io/node-id"
"""The label by which Ray names a machine."""


def on_this_machine() -> dict[str, Any]:
    """Options of tasks and actors that need this machine's files."""
    return {"label_selector": {NODE_ID: ray.get_runtime_context().get_node_id()}}


def gpus(*, here: bool) -> int:
    """How many GPUs the cluster has now.

    Args:
        here: count only those of this machine.
    """
    mine = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and (not here or node["NodeID"] == mine)]
    return int(sum(node["Resources"].get("GPU", 0) for node in nodes))
