"""The files of deploy/, as tests read them."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def read(name: str) -> str:
    return (DEPLOY / name).read_text()


@cache
def compose() -> dict[str, Any]:
    return yaml.safe_load(read("compose.yaml"))


@cache
def manifests() -> list[dict[str, Any]]:
    """Kubernetes objects of all files but kustomize's own."""
    paths = [path for path in sorted(DEPLOY.glob("kubernetes/*.yaml")) if path.name != "kustomization.yaml"]
    return [each for path in paths for each in yaml.safe_load_all(path.read_text())]


def manifest(kind: str) -> dict[str, Any]:
    (found,) = (each for each in manifests() if each["kind"] == kind)
    return found


def serve_config() -> dict[str, Any]:
    return yaml.safe_load(manifest("RayService")["spec"]["serveConfigV2"])


def clusters() -> list[dict[str, Any]]:
    return [manifest("RayService")["spec"]["rayClusterConfig"], manifest("RayJob")["spec"]["rayClusterSpec"]]


def pod_templates() -> list[dict[str, Any]]:
    """Of the Ray clusters and of the server of the remote tier."""
    groups = [group for cluster in clusters() for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    return [*(group["template"] for group in groups), manifest("StatefulSet")["spec"]["template"]]


def words(command: str) -> list[str]:
    """Words of a command line, with the values that compose's variables have by themselves."""
    return shlex.split(re.sub(r"\$\{\w+:-(.*?)\}", r"\1", command))


def command_lines() -> dict[str, list[str]]:
    """What `cachetune` is started with, without its name."""
    services = compose()["services"]
    lines = {f"compose: {name}": words(services[name]["command"]) for name in ("precompute", "server")}
    program, *rest = words(manifest("RayJob")["spec"]["entrypoint"])
    assert program == "cachetune"
    return lines | {"RayJob": rest}


def option(line: list[str], name: str) -> str | None:
    return line[line.index(name) + 1] if name in line else None
