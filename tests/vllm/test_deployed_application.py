"""What deploy/ gives to Ray and vLLM is known to them. Nothing is started, and vLLM's source is read, because loading it would take longer than all the rest."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray")
pytest.importorskip("fastapi")

from ray.serve.deployment import Application
from ray.serve.schema import ServeDeploySchema

from cachetune_ray.serving import build

DEPLOY = Path(__file__).parents[2] / "deploy"


def serve_config() -> dict[str, Any]:
    service = yaml.safe_load((DEPLOY / "kubernetes/service.yaml").read_text())
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def test_rays_schema_reads_the_configuration_and_the_application_is_made() -> None:
    (application,) = ServeDeploySchema(**serve_config()).applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    assert isinstance(build(dict(application.args)), Application)


def test_vllm_has_the_metrics_of_the_dashboard() -> None:
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    source = (Path(found.origin).parent / "v1/metrics/loggers.py").read_text()
    dashboard = (DEPLOY / "grafana/dashboards/cachetune.json").read_text()
    expressions = re.findall(r'"expr": (".*"),?$', dashboard, re.MULTILINE)
    named = {name for each in expressions for name in re.findall(r"vllm:\w+", json.loads(each))}
    assert len(named) == 3
    for name in named:
        assert f'"{name.removesuffix("_bucket")}"' in source, name


def test_vllm_has_the_options_that_it_is_given() -> None:
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    server = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["server"]["command"]
    options = shlex.split(serve_config()["applications"][0]["args"]["options"])
    given = {word for word in (*options, *server.split()) if word.startswith("--")}
    own = {"--store", "--remote", "--store-key", "--host-budget", "--disk-budget"}  # tests/deploying looks at these
    folder = Path(found.origin).parent
    files = [folder / "engine/arg_utils.py", *folder.glob("entrypoints/**/cli_args.py")]
    sources = [file.read_text() for file in files]
    assert len(sources) > 1
    assert len(given - own) > 3
    for option in given - own:
        name = option.removeprefix("--").replace("-", "_")
        assert any(f'"{option}"' in each or re.search(rf"^    {name}:", each, re.MULTILINE) for each in sources), option
