"""What has to run on this machine, because it reads or writes its disk."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.client import ray as client

from cachetune_rag.errors import ConfigError

NODE_ID = "ray.io/node-id"
"""The label by which Ray names a machine."""


def on_this_machine(what: str) -> dict[str, Any]:
    """Options of tasks and actors that need this machine's files.

    Args:
        what: needs them, for the message.

    Raises:
        ConfigError: this machine is no part of the cluster (`ray://`), so nothing can run on it.
    """
    if client.is_connected():
        raise ConfigError(
            f"{what} is on this machine, which is no part of the cluster that it is connected to by ray://. Use a URL that all machines reach "
            "(s3://bucket/prefix, file:///shared/folder), or start this on a machine of the cluster (`ray job submit` does)."
        )
    return {"label_selector": {NODE_ID: ray.get_runtime_context().get_node_id()}}


def gpus(*, here: bool) -> int:
    """How many GPUs the cluster has now.

    Args:
        here: count only those of this machine.
    """
    mine = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and (not here or node["NodeID"] == mine)]
    return int(sum(node["Resources"].get("GPU", 0) for node in nodes))
