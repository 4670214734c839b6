"""What the files of deploy/ start, show and name exists, and the parts fit together."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import typer.main
import yaml
from deployed import (
    DEPLOY,
    ROOT,
    clusters,
    command_lines,
    compose,
    manifest,
    manifests,
    option,
    pod_templates,
    read,
    serve_config,
    words,
)
from typer.testing import CliRunner

import cachetune_rag
from cachetune_rag.cli.app import app
from cachetune_store.remote.places import is_remote
from cachetune_vllm.serve import app as serving
from cachetune_vllm.settings import ServerSettings

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
DASHBOARD = json.loads(read("grafana/dashboards/cachetune.json"))


def accept(line: list[str]) -> None:
    """Give a command line to the parser that `cachetune` has. `serve` is run up to where it would start vLLM."""
    name, *rest = line
    if name == "serve":
        shown = CliRunner().invoke(serving, [*rest, "--dry-run"])
        assert shown.exit_code == 0, shown.output
    else:
        COMMANDS[name].make_context(name, rest)


@pytest.mark.parametrize(("name", "line"), command_lines().items())
def test_command_lines_are_accepted(name: str, line: list[str]) -> None:
    accept(line)


def test_a_command_line_that_is_wrong_is_not() -> None:
    line = command_lines()["compose: precompute"]
    with pytest.raises(Exception, match="--stor-key"):
        accept([*line, "--stor-key", "x"])
    with pytest.raises(AssertionError, match="ratio is 7"):
        accept([*command_lines()["compose: server"], "--ratio", "7"])


def shared(line: list[str]) -> dict[str, str | None]:
    """What has to be the same where KV is made and where it is used."""
    model = option(line, "--model") or line[1]
    store, remote = option(line, "--store"), option(line, "--remote")
    place = store if store is not None and is_remote(store) else remote
    return {"model": model, "dtype": option(line, "--dtype"), "place": place, "key": option(line, "--store-key")}


def test_servers_use_what_precompute_makes() -> None:
    lines = command_lines()
    assert shared(lines["compose: precompute"]) == shared(lines["compose: server"])
    given = serve_config()["applications"][0]["args"]
    served = {
        "model": given["model"],
        "dtype": option(words(given["options"]), "--dtype"),
        "place": given["remote"],
        "key": given["store_key"],
    }
    assert shared(lines["RayJob"]) == served
    assert all(served.values())


def test_the_application_is_where_the_manifest_says() -> None:
    (application,) = serve_config()["applications"]
    module, _, name = application["import_path"].partition(":")
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.origin is not None
    functions = {
        node.name: node for node in ast.parse(Path(found.origin).read_text()).body if isinstance(node, ast.FunctionDef)
    }
    assert [each.arg for each in functions[name].args.args] == ["arguments"]
    own = {each.arg for each in functions["application"].args.kwonlyargs} | {"model", "options"}
    ServerSettings.of({key: value for key, value in application["args"].items() if key not in own})


def test_a_cluster_has_what_its_replicas_ask_for() -> None:
    given = serve_config()["applications"][0]["args"]
    (group,) = manifest("RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert (
        group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"]) >= given["replicas"] * given["gpus"]
    )
    assert int(container["resources"]["requests"]["cpu"]) == int(group["rayStartParams"]["num-cpus"]) > given["cpus"]
    kv = next(each for each in group["template"]["spec"]["volumes"] if each["name"] == "kv")["emptyDir"]["sizeLimit"]
    assert gib(kv) > gib(given["disk_budget"])
    assert gib(container["resources"]["limits"]["memory"]) > gib(given["host_budget"]) * 2


def gib(size: str) -> int:
    return int(re.fullmatch(r"(\d+)Gi?B?", size)[1])  # type: ignore[index]


def test_images_carry_a_version() -> None:
    containers = [each for template in pod_templates() for each in template["spec"]["containers"]]
    images = [each["image"] for each in (*containers, *compose()["services"].values())]
    images += re.findall(r"^FROM (\S+)", read("Dockerfile"), re.MULTILINE)
    for image in images:
        assert re.fullmatch(r"[a-z-]+(/[a-z-]+)?:v?\d+\.\d+\.\d+", image), image
    ours = {image.split(":")[1] for image in images if image.startswith("cachetune-rag:")}
    assert ours == {cachetune_rag.__version__}
    assert {len({i for i in images if i.startswith(f"{name}:")}) for name in {i.split(":")[0] for i in images}} == {1}


def test_rays_version_is_that_of_the_image() -> None:
    (version,) = re.findall(r"^ray\[.*\]==(.*)$", read("requirements.txt"), re.MULTILINE)
    assert {cluster["rayVersion"] for cluster in clusters()} == {version}


def test_vllms_version_is_one_that_is_supported() -> None:
    (minor,) = re.findall(r"^FROM vllm/vllm-openai:v0\.(\d+)\.\d+$", read("Dockerfile"), re.MULTILINE)
    first, last = re.findall(r"vLLM 0\.(\d+) to 0\.(\d+) are supported", (ROOT / "docs/vllm.md").read_text())[0]
    assert int(first) <= int(minor) <= int(last)


def test_nothing_runs_as_root() -> None:
    users = re.findall(r"^USER (\S+)", read("Dockerfile"), re.MULTILINE)
    assert users == ["10001:10001"]
    for template in pod_templates():
        context = template["spec"]["securityContext"]
        assert (context["runAsNonRoot"], context["runAsUser"]) == (True, 10001)
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_every_service_is_watched() -> None:
    for name, service in compose()["services"].items():
        assert "healthcheck" in service or name == "server", name  # whose image brings it
    assert "\nHEALTHCHECK" in read("Dockerfile")
    for template in pod_templates():
        for container in template["spec"]["containers"]:
            assert {"livenessProbe", "readinessProbe"} <= set(container)
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])


def test_the_stores_key_is_mounted_where_the_commands_read_it() -> None:
    services = compose()["services"]
    for name in ("precompute", "server"):
        folder, _, key = str(option(command_lines()[f"compose: {name}"], "--store-key")).rpartition("/")
        assert folder == "/run/secrets"
        assert key in services[name]["secrets"]
    (secret,) = yaml.safe_load(read("kubernetes/kustomization.yaml"))["secretGenerator"]
    (file,) = (name.split("=")[0] for name in secret["files"])
    for template in pod_templates()[:-1]:
        (container,) = template["spec"]["containers"]
        volumes = {each["name"]: each for each in template["spec"]["volumes"]}
        (mount,) = (m for m in container["volumeMounts"] if "secret" in volumes[m["name"]])
        assert volumes[mount["name"]]["secret"]["secretName"] == secret["name"]
        assert f"{mount['mountPath']}/{file}" == serve_config()["applications"][0]["args"]["store_key"]


def test_the_parts_find_each_other() -> None:
    server = command_lines()["compose: server"]
    port = option(server, "--port")
    assert f"http://localhost:{port}/health" in read("Dockerfile")
    assert option(server, "--remote") == "valkey://valkey:6379/kv"
    assert "valkey" in compose()["services"]
    (job,) = yaml.safe_load(read("prometheus.yml"))["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{port}"]}]
    (source,) = yaml.safe_load(read("grafana/provisioning/datasources/prometheus.yaml"))["datasources"]
    assert source["url"] == "http://prometheus:9090"
    named = {json.dumps(each) for each in within(DASHBOARD, "datasource")}
    assert named == {json.dumps({"type": "prometheus", "uid": source["uid"]})}
    (provider,) = yaml.safe_load(read("grafana/provisioning/dashboards/files.yaml"))["providers"]
    mounted = dict(each.split(":")[:2] for each in compose()["services"]["grafana"]["volumes"])
    assert mounted["./grafana/dashboards"] == provider["options"]["path"]
    service = next(each for each in manifests() if each["kind"] == "Service")
    assert (service["metadata"]["name"], service["spec"]["ports"][0]["port"]) == ("valkey", 6379)
    allowed = manifest("NetworkPolicy")["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    for template in pod_templates()[:-1]:
        assert allowed.items() <= template["metadata"]["labels"].items()


def within(value: Any, name: str) -> list[Any]:
    """What stands under a name, at any depth."""
    if isinstance(value, list):
        return [found for each in value for found in within(each, name)]
    if isinstance(value, dict):
        return [*([value[name]] if name in value else []), *(f for each in value.values() for f in within(each, name))]
    return []


def exported() -> dict[str, set[str]]:
    """The connector's metrics under the names that Prometheus sees, each with its labels. vLLM isn't in this environment, so the file is read, not run."""
    found: dict[str, set[str]] = {}
    own = {"model_name", "engine"}  # vLLM's, of every metric
    for node in ast.walk(ast.parse((ROOT / "adapters/cachetune_vllm/metrics.py").read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        if node.func.id == "count":
            name, _, *labels = (ast.literal_eval(each) for each in node.args)
            found[f"cachetune_vllm_{name}_total"] = own | set(labels)
        if node.func.id == "histogram":
            (name,) = (ast.literal_eval(each.value) for each in node.keywords if each.arg == "name")
            found |= {f"{name}_bucket": own | {"le"}, f"{name}_sum": own, f"{name}_count": own}
    return found


def selectors(expression: str) -> list[Any]:
    """The metrics that a query reads; an error if it is no query."""
    for variable in ("$__range", "$__rate_interval"):
        expression = expression.replace(variable, "5m")
    found: list[Any] = []

    def visit(part: Any) -> bool:
        if isinstance(part, promql_parser.MatrixSelector):
            found.append(part.vector_selector)
        elif isinstance(part, promql_parser.VectorSelector):
            found.append(part)
        return True

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    metrics, shown = exported(), set()
    assert len(metrics) == 9
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            for selector in selectors(target["expr"]):
                if selector.name.startswith("vllm:"):  # tests/vllm/test_deployed_application.py looks at these
                    continue
                assert {matcher.name for matcher in selector.matchers.matchers} <= metrics[selector.name]
                shown.add(selector.name)
            by = re.findall(r" by \((\w+)\)", target["expr"])
            named = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
            assert set(named) <= set(by), target["legendFormat"]
    assert {name for name in metrics if not name.endswith(("_sum", "_count"))} == shown


def test_panels_have_numbers_of_their_own_and_say_what_they_show() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["description"].endswith(".") for panel in panels)
    places = [panel["gridPos"] for panel in panels]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_the_read_me_names_every_part() -> None:
    text = read("README.md")
    for path in DEPLOY.rglob("*"):
        if path.is_file() and "secrets" not in path.parts and path.name != "README.md":
            assert f"`{path.relative_to(DEPLOY)}`" in text or f"`{path.parent.relative_to(DEPLOY)}/`" in text, path
