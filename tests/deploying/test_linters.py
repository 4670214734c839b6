"""The files of deploy/ pass the linters of their kind. Nothing is downloaded: these have the schemas with them."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema
from deployed import DEPLOY, ROOT, compose, manifests, pod_templates

KUBERNETES = "1.37"
KUBERAY = jsonschema.Draft7Validator(json.loads((Path(__file__).parent / "kuberay.schema.json").read_text()))


def run(*command: str) -> str:
    """What a linter says; it is in this environment."""
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    program = shutil.which(command[0], path=places)
    assert program is not None, f"{command[0]} is not there: it is in the dev group of pyproject.toml"
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=60)
    return "" if done.returncode == 0 else done.stdout + done.stderr or f"status {done.returncode}"


def test_yaml() -> None:
    assert run("yamllint", "--strict", "--config-file", str(DEPLOY / ".yamllint.yaml"), str(DEPLOY)) == ""


def test_the_container_file(tmp_path: Path) -> None:
    assert run("hadolint", "--no-color", str(DEPLOY / "Dockerfile")) == ""
    unpinned = tmp_path / "Dockerfile"
    unpinned.write_text((DEPLOY / "Dockerfile").read_text().replace("vllm-openai:v0.32.0", "vllm-openai"))
    assert "DL3006" in run("hadolint", "--no-color", str(unpinned))


def test_the_compose_file() -> None:
    schema = jsonschema.Draft202012Validator(get_builtin_schema("vendor.compose-spec"))
    schema.validate(compose())
    wrong = copy.deepcopy(compose())
    wrong["services"]["server"]["health_check"] = {}
    with pytest.raises(jsonschema.ValidationError, match="health_check"):
        schema.validate(wrong)


def test_what_the_compose_file_names_is_there() -> None:
    whole = compose()
    for name, service in whole["services"].items():
        assert set(service["networks"]) <= set(whole["networks"]), name
        assert set(service.get("secrets", [])) <= set(whole["secrets"]), name
        assert set(service.get("depends_on", [])) <= set(whole["services"]), name
        for volume in service["volumes"]:
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            assert source.startswith("$") or source in whole["volumes"] or (DEPLOY / source).exists(), source


def test_kubernetes_objects() -> None:
    own = [each for each in manifests() if not each["apiVersion"].startswith("ray.io/")]
    assert {each["kind"] for each in own} == {"Namespace", "Service", "StatefulSet", "NetworkPolicy"}
    for each in own:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)


def as_object(template: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}


def test_pods_of_ray_clusters_follow_kubernetes_own_schema() -> None:
    assert len(pod_templates()) == 5
    for template in pod_templates():
        kubernetes_validate.validate(as_object(template), KUBERNETES, strict=True)
    wrong = copy.deepcopy(pod_templates()[0])
    wrong["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(as_object(wrong), KUBERNETES, strict=True)


def test_kuberays_objects() -> None:
    rays = [each for each in manifests() if each["apiVersion"].startswith("ray.io/")]
    assert {each["kind"] for each in rays} == {"RayService", "RayJob"}
    for each in rays:
        KUBERAY.validate(each)
        wrong = copy.deepcopy(each)
        wrong["spec"]["shutDownAfterJobFinishes"] = True
        assert not KUBERAY.is_valid(wrong)


def test_every_file_of_kubernetes_is_used() -> None:
    whole = yaml.safe_load((DEPLOY / "kubernetes/kustomization.yaml").read_text())
    files = {path.name for path in DEPLOY.glob("kubernetes/*.yaml")}
    assert {*whole["resources"], "kustomization.yaml", "precompute.yaml"} == files
    assert {each["metadata"].get("namespace", "cachetune") for each in manifests()} == {whole["namespace"]}


def test_what_the_image_installs_is_what_the_project_is_tested_with() -> None:
    tested = dict(line.split("==") for line in lines(ROOT / "constraints.txt"))
    for name, version in (line.split("==") for line in lines(DEPLOY / "requirements.txt")):
        assert tested[name.split("[")[0]] == version, name


def lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def test_keys_are_not_in_the_repository() -> None:
    for place in ("deploy/secrets/store.key", "deploy/secrets/grafana.password", "deploy/kubernetes/secrets/store.key"):
        if shutil.which("git") and (ROOT / ".git").exists():
            assert subprocess.run(["git", "-C", str(ROOT), "check-ignore", "--quiet", place]).returncode == 0, place
