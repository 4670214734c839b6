"""Settings of a vLLM server with reuse, what its requests may say, and the line that starts it. None of it needs vLLM."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from cachetune_rag import ConfigError
from cachetune_vllm.middleware import CheckRequests
from cachetune_vllm.serve import app, command_line, transfer_config
from cachetune_vllm.settings import RequestSettings, RequestSettingsError, ServerSettings

SERVER = ServerSettings.of({"store": "kv", "tenant": "a", "ratio": 0.2})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "store"),
        ({"store": ""}, "store"),
        ({"store": "kv", "rato": 0.1}, "did you mean 'ratio'"),
        ({"store": "kv", "ratio": 1.5}, "0 .* to 1"),
        ({"store": "kv", "max_kl": -1}, "max_kl is -1: use nats"),
        ({"store": "kv", "max_kl": 0.05, "ratio": 0.1}, "ratio is 0.1, and max_kl finds the ratio itself"),
        ({"store": "kv", "min_top1": 0.9, "selector": "frequency"}, "says nothing about the request"),
        ({"store": "kv", "ratio": True}, "True"),
        ({"store": "kv", "selector": "best"}, "expected_error"),
        ({"store": "kv", "loads_at_once": 0}, "from 1 on"),
        ({"store": "kv", "prompt_memory": "much"}, "prompt_memory is 'much'; give bytes .* or \"auto\""),
        ({"store": "kv", "prompt_memory": 0}, "prompt_memory is 0, so no prompt could reuse chunks"),
        ({"store": "kv", "least_reused": -1}, "from 0 on"),
        ({"store": "kv", "tenant": 3}, "tenant is 3"),
        ({"store": "kv", "tenant_from_request": "yes"}, "true or false"),
        ({"store": " "}, "store is ' '"),
        ({"store": "kv", "remote": ""}, "remote is '': use a URL"),
        ({"store": "kv", "host_budget": "x"}, "host_budget is 'x'; give bytes"),
        ({"store": "kv", "disk_budget": -5}, "disk_budget is -5; give bytes"),
        ({"store": "kv", "device_budget": "1GB?"}, "device_budget is '1GB.'; give bytes"),
        ({"store": "kv", "read_timeout": -1}, "read_timeout is -1: use seconds above 0"),
        ({"store": "kv", "codec": "zip"}, "codec is 'zip': use one of exact"),
        ({"store": "kv", "codec": None}, "codec is None: use one of exact"),
        ({"store": "kv", "remote_codec": 3}, "remote_codec is 3: use one of exact"),
    ],
)
def test_a_server_refuses_settings_that_it_cannot_use(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ServerSettings.of(given)


def test_a_request_has_the_servers_settings_unless_it_says_otherwise() -> None:
    assert RequestSettings.of(None, SERVER) == RequestSettings(None, 0.2, "auto", "a", True)
    given = {"chunks": ["x", "y"], "ratio": 0, "selector": "frequency", "reuse": False}
    assert RequestSettings.of(given, SERVER) == RequestSettings(("x", "y"), 0, "frequency", "a", False)
    assert RequestSettings.of({"explain": True}, SERVER) == RequestSettings(None, 0.2, "auto", "a", True, True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("yes", "chunks, ratio, selector, tenant, reuse"),
        ({"ratoi": 1}, "did you mean 'ratio'"),
        ({"ratio": -0.1}, "ratio is -0.1"),
        ({"ratio": "much"}, "much"),
        ({"selector": ["frequency"]}, "selector is"),
        ({"chunks": "one text"}, "list of the texts"),
        ({"chunks": ["a", 2]}, r"chunks\[1\] is 2"),
        ({"chunks": ["\ud800"]}, r"chunks\[0\] has a lone surrogate"),
        ({"reuse": 1}, "true or false"),
        ({"explain": "yes"}, "true or false"),
        ({"tenant": "b"}, "tenant_from_request"),
        ({"store": "/etc"}, "none of a request's"),
        ({"min_top1": 9}, "min_top1 is 9: use a probability"),
        ({"min_top1": 0.9, "ratio": 0.1}, "ratio is 0.1, and min_top1 finds the ratio itself"),
        ({"max_kl": 0.1, "selector": "none"}, "says nothing about the request"),
    ],
)
def test_a_request_is_refused_with_what_is_allowed(given: object, said: str) -> None:
    with pytest.raises(RequestSettingsError, match=said):
        RequestSettings.of(given, SERVER)


def test_a_bound_stands_in_place_of_a_ratio() -> None:
    asked = RequestSettings.of({"max_kl": 0.05, "min_top1": 0.9}, SERVER)
    assert (asked.ratio, asked.max_kl, asked.min_top1) == ("auto", 0.05, 0.9), "the server's ratio is not meant"
    bounded = ServerSettings.of({"store": "kv", "max_kl": 0.1})
    for given, expected in (
        ({}, ("auto", 0.1, None)),
        ({"ratio": 0.3}, (0.3, None, None)),
        ({"min_top1": 0.9}, ("auto", None, 0.9)),
        ({"selector": "probe"}, ("auto", 0.1, None)),
        ({"selector": "frequency"}, ("auto", None, None)),
    ):
        asked = RequestSettings.of(given, bounded)
        assert (asked.ratio, asked.max_kl, asked.min_top1) == expected
    assert RequestSettings.of({}, bounded).bounded
    assert not RequestSettings.of({"ratio": 0.3}, bounded).bounded


def test_only_a_server_behind_a_gateway_lets_requests_name_their_tenant() -> None:
    behind = ServerSettings.of({"store": "kv", "tenant": "a", "tenant_from_request": True})
    assert RequestSettings.of({"tenant": "b"}, behind).tenant == "b"
    assert RequestSettings.of({}, behind).tenant == "a"
    with pytest.raises(RequestSettingsError, match="no valid Unicode"):
        RequestSettings.of({"tenant": "\ud800"}, behind)


async def through_middleware(body: bytes) -> tuple[list[dict[str, Any]], list[bytes]]:
    """What is sent back by the middleware itself, and the bodies that reach the server behind it."""
    sent: list[dict[str, Any]] = []
    reached: list[bytes] = []

    async def server(scope: Any, receive: Any, send: Any) -> None:
        reached.append(b"")
        while True:
            message = await receive()
            reached[-1] += message["body"]
            if not message["more_body"]:
                return

    pieces = [body[:7], body[7:]]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    config = {"kv_connector_extra_config": {"store": "kv"}}
    state = SimpleNamespace(args=SimpleNamespace(kv_transfer_config=config))
    scope = {"type": "http", "method": "POST", "app": SimpleNamespace(state=state)}
    await CheckRequests(server)(scope, receive, send)
    return sent, reached


async def test_the_middleware_answers_400_and_says_why() -> None:
    body = json.dumps({"prompt": "Hi", "kv_transfer_params": {"cachetune": {"ratio": 7}}}).encode()
    sent, reached = await through_middleware(body)
    assert reached == []
    assert sent[0]["status"] == 400
    assert "ratio is 7" in json.loads(sent[1]["body"])["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "Hi"}',
        b'{"prompt": "cachetune", "kv_transfer_params": {"other": 1}}',
        b'{"kv_transfer_params": {"cachetune": {"ratio": 0.3}}}',
        b'{"kv_transfer_params": ["cachetune"]}',
        b'"cachetune"',
        b"{cachetune",
        b"[" * 100_000 + b'"cachetune"',
    ],
)
async def test_the_middleware_passes_all_else_on_unchanged(body: bytes) -> None:
    assert await through_middleware(body) == ([], [body])


def test_serve_shows_the_line_that_starts_a_stock_server() -> None:
    words = command_line("M", {"store": "/kv", "ratio": 0.1}, ["--port", "9"])
    assert words[:3] == ["vllm", "serve", "M"]
    config = json.loads(words[words.index("--kv-transfer-config") + 1])
    assert (config["kv_connector"], config["kv_connector_module_path"]) == ("CacheTuneConnector", "cachetune_vllm")
    assert config["kv_connector_extra_config"] == {"store": "/kv", "ratio": 0.1}
    assert words[-2:] == ["--port", "9"]
    with pytest.raises(ConfigError, match="leave it out"):
        command_line("M", {"store": "/kv"}, ["--kv-transfer-config={}"])
    with pytest.raises(ConfigError, match="ratio is 3"):
        transfer_config({"store": "/kv", "ratio": 3})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["M", "--store", ""], "a path is ''"),
        (["M", "--store", " "], "a path is ' '"),
        (["M", "--store", "kv", "--store-key", ""], "a path is ''"),
        (["", "--store", "kv"], "model is ''"),
        (["M", "--store", "kv", "--min-sure", "0.9"], "Ask again where the model is not sure"),
        (["M", "--store", "kv", "--min_sure=0.9"], "Ask again where the model is not sure"),
        (["M", "--store", "kv", "--max-new-tokens", "5"], "max_tokens"),
        (["M", "--store", "kv", "--host-budget", "x"], "host_budget is 'x'"),
    ],
    ids=str,
)
def test_the_command_refuses_what_no_server_can_be_started_with(words: list[str], said: str) -> None:
    result = CliRunner().invoke(app, [*words, "--dry-run"])
    assert result.exit_code == 2
    assert said in result.output
    assert "vllm serve" not in result.output


def test_the_command_passes_vllms_options_on() -> None:
    command = [sys.executable, "-m", "cachetune_rag", "serve", "M", "-s", "kv", "--dry-run", "--max-model-len", "512"]
    command += ["--least-reused", "16", "--loads-at-once", "4", "--prompt-memory", "3GiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    words = shlex.split(done.stderr)
    assert words[-2:] == ["--max-model-len", "512"]
    given = json.loads(words[words.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]
    assert (given["least_reused"], given["loads_at_once"], given["prompt_memory"]) == (16, 4, "3GiB")
    assert done.stdout == ""
