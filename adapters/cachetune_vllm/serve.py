"""`cachetune serve`: starts `vllm serve` with the connector, and shows that command line."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from cachetune_rag.checking.escaping import visible_line
from cachetune_rag.errors import CacheTuneError, ConfigError
from cachetune_store import StoreError
from cachetune_store.printing import shown, without_password
from cachetune_store.remote.places import is_remote
from cachetune_vllm.settings import ServerSettings

MIDDLEWARE = "cachetune_vllm.middleware.CheckRequests"

_NOT_HERE = {
    "--min-sure": 'vLLM can\'t read a prompt again in the middle of its answer. Whoever asks can (docs/vllm.md, "Ask again where the model is not sure").',
    "--max-new-tokens": "each request says how long its answer may be (`max_tokens`).",
}
"""Options of `cachetune ask` that are tried here, and what there is in their place."""

_OTHERS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def transfer_config(settings: dict[str, Any]) -> str:
    """The value of vLLM's option `--kv-transfer-config`.

    Raises:
        ConfigError: a setting can't be used.
    """
    ServerSettings.of(settings)
    return json.dumps(
        {
            "kv_connector": "CacheTuneConnector",
            "kv_connector_module_path": "cachetune_vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": settings,
        }
    )


def command_line(model: str, settings: dict[str, Any], others: Sequence[str]) -> list[str]:
    """The words that start the server.

    Args:
        model: folder of the model, or its hub id.
        settings: the connector's, by name (see `ServerSettings`).
        others: options of `vllm serve`.

    Raises:
        ConfigError: a setting or the model can't be used, or one of the options is the connector's own, or one of another command.
    """
    if not model.strip():
        raise ConfigError(f"model is {shown(model)}: use a folder made by save_pretrained, or a hub id.")
    for word in others:
        if (name := word.split("=")[0].replace("_", "-")) in _NOT_HERE:
            raise ConfigError(f"{name} is no option of a server: {_NOT_HERE[name]}")
    if any(word.split("=")[0] in ("--kv-transfer-config", "--kv_transfer_config") for word in others):
        raise ConfigError(
            "--kv-transfer-config is what `cachetune serve` makes: leave it out, or use `vllm serve` with a value of your own."
        )
    own = [
        "--kv-transfer-config",
        transfer_config(settings),
        "--middleware",
        MIDDLEWARE,
        "--enable-prompt-tokens-details",
    ]
    return ["vllm", "serve", model, *own, *others]


def module_and_words(words: Sequence[str]) -> list[str]:
    """The module that runs a line of `vllm serve`, and its arguments: vLLM's own command, or `vllm_cpu` where vLLM has another name."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return ["cachetune_vllm.vllm_cpu", *words[1:]]
    return ["vllm.entrypoints.cli.main", *words[1:]]


def _whole_number_or_name(value: str) -> int | str:
    try:
        return int(value)
    except ValueError:
        return value


def _absolute(path: str) -> str:
    """A path for the server's processes, which may have another current directory.

    Raises:
        ConfigError: it is empty, which would be taken for the current folder.
    """
    if not path.strip():
        raise ConfigError(
            f"a path is {shown(path)} (a variable that isn't set, perhaps): name a folder or file, or . for this folder."
        )
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111 (a Path would drop a closing slash and "./")


def _number_or_name(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def _stored_dtype(settings: Mapping[str, Any], others: Sequence[str], *, starts: bool) -> list[str]:
    """The option that makes vLLM compute in the number format of the stored chunks; empty where the user says it, or nothing is stored.

    By itself, vLLM takes a format that depends on the device and the model's files, and so does `cachetune precompute`: on a CPU, these are
    different ones, and no chunk would be found. Where vLLM will be started (`starts`), the store is opened in any case: one that can't be, for
    example with this key, is better found now than when vLLM has loaded the model. A line that is only shown may be for another machine.

    Raises:
        ConfigError: a setting can't be used.
        StoreError: the store can't be used.
    """
    given = any(word.split("=")[0] in ("--dtype", "--config") for word in others)
    if given and not starts:
        return []
    from cachetune_vllm.stored import stored_dtype  # it loads torch: only when needed

    dtype = stored_dtype(ServerSettings.of(settings))
    return [] if given or dtype is None else ["--dtype", dtype]


@app.command(context_settings=_OTHERS)
def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of the model, or its hub id.", show_default=False)
    ],
    store: Annotated[
        str, typer.Option("--store", "-s", metavar="FOLDER", help="Folder of the KV store, or a URL as of --remote.")
    ],
    tenant: Annotated[str | None, typer.Option(metavar="NAME", help="Whose chunks the server uses.")] = None,
    codec: Annotated[str | None, typer.Option(metavar="NAME", help="How missed chunks are stored.")] = None,
    host_budget: Annotated[str | None, typer.Option(metavar="BYTES", help="Memory that keeps chunks at hand.")] = None,
    disk_budget: Annotated[str | None, typer.Option(metavar="BYTES", help="Most bytes of the store.")] = None,
    device_budget: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Memory of the GPU that keeps chunks in use at hand.")
    ] = None,
    remote: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A place that machines share, behind the store: s3://BUCKET/PREFIX, valkey://HOST:PORT, ...",
        ),
    ] = None,
    remote_codec: Annotated[str | None, typer.Option(metavar="NAME", help="How chunks are stored there.")] = None,
    store_key: Annotated[
        str | None, typer.Option(metavar="FILE", help="File with the store's key, or env:NAME for a variable.")
    ] = None,
    encrypt: Annotated[
        bool, typer.Option("--encrypt", help="Encrypt a new store with its key, and refuse one that isn't.")
    ] = False,
    ratio: Annotated[
        str | None, typer.Option(metavar="R", help="Share of chunk tokens to recompute, 0 to 1, or auto.")
    ] = None,
    selector: Annotated[str | None, typer.Option(metavar="NAME", help="What chooses those tokens.")] = None,
    max_kl: Annotated[
        float | None, typer.Option(metavar="NATS", help="Most KL of a first token, by prediction; in place of --ratio.")
    ] = None,
    min_top1: Annotated[
        float | None, typer.Option(metavar="P", help="Least probability that a first token is vLLM's own, likewise.")
    ] = None,
    read_timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="How long a request waits for the store's disk.")
    ] = None,
    least_reused: Annotated[
        str | None,
        typer.Option(metavar="N", help="Leave prompts to vLLM that reuse would save fewer tokens of, or auto."),
    ] = None,
    loads_at_once: Annotated[
        int | None, typer.Option(metavar="N", help="Prompts that may wait for their keys and values at once.")
    ] = None,
    prompt_memory: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Most memory of the GPU for the prompts at hand, or auto.")
    ] = None,
    tenant_from_request: Annotated[
        bool,
        typer.Option("--tenant-from-request", help="A gateway in front of the server names each request's tenant."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the line and start nothing.")] = False,
) -> None:
    """Serve MODEL with vLLM, and reuse the stored chunks of STORE in every prompt that shows them.

    All further options are those of `vllm serve`: --port, --max-model-len, --gpu-memory-utilization and so on.
    """
    try:
        given = {
            "store": store if is_remote(store) else _absolute(store),
            "tenant": tenant,
            "codec": codec,
            "host_budget": host_budget,
            "disk_budget": disk_budget,
            "device_budget": device_budget,
            "remote": remote,
            "remote_codec": remote_codec,
            "store_key": store_key if store_key is None or store_key.startswith("env:") else _absolute(store_key),
            "encrypt": encrypt or None,
            "ratio": None if ratio is None else _number_or_name(ratio),
            "selector": selector,
            "max_kl": max_kl,
            "min_top1": min_top1,
            "read_timeout": read_timeout,
            "least_reused": None if least_reused is None else _whole_number_or_name(least_reused),
            "loads_at_once": loads_at_once,
            "prompt_memory": prompt_memory,
            "tenant_from_request": tenant_from_request or None,
        }
        settings = {name: value for name, value in given.items() if value is not None}
        showable = {
            name: without_password(value) if isinstance(value, str) else value for name, value in settings.items()
        }
        others = [*_stored_dtype(settings, context.args, starts=not dry_run), *context.args]
        words, shown_words = (command_line(model, each, others) for each in (settings, showable))
    except (CacheTuneError, StoreError) as error:
        typer.echo(f"cachetune: {visible_line(str(error))}", err=True)
        raise typer.Exit(2) from None
    typer.echo(shlex.join(shown_words), err=True)
    if dry_run:
        return
    if importlib.util.find_spec("vllm") is None:
        typer.echo("cachetune: vLLM isn't installed: pip install 'cachetune-rag[vllm]'", err=True)
        raise typer.Exit(2)
    sys.stderr.flush()
    # In place of this process, so that signals and the exit status are vLLM's own.
    os.execv(sys.executable, [sys.executable, "-m", *module_and_words(words)])


if __name__ == "__main__":
    app(prog_name="cachetune serve")
