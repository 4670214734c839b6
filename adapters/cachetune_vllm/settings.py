"""Settings of a server, and those that a request may give for itself. Both are checked here; nothing here needs vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from cachetune_rag.checking.arguments import check_count, check_tenant, hint, is_number
from cachetune_rag.errors import ConfigError, PromptError
from cachetune_rag.text.tokenizer import check_text
from cachetune_store import StoreError
from cachetune_store.printing import shown

REQUEST_KEY = "cachetune"
"""The name under which a request's `kv_transfer_params` hold its settings, and a response's hold its report."""

BOUNDS = ("max_kl", "min_top1")
"""How far from vLLM's own answer a request may be."""

TENANTS = 64
"""Tenants that a server keeps ready at the same time; beyond that, the one whose last request is oldest makes room."""


class RequestSettingsError(ConfigError):
    """A request's settings can't be used. The message names the value and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """`kv_connector_extra_config` of a server.

    Attributes:
        store: folder of the store, or the URL of a place that machines share.
        tenant: whose chunks the server uses; its operator's.
        tenant_from_request: whether a request may name another tenant. For servers behind a gateway that sets the name.
        codec, host_budget, disk_budget, device_budget, read_timeout, remote, remote_codec, store_key, encrypt: see `docs/options.md`.
        lead_in: see `docs/options.md`; it has to be what the store was filled with.
        ratio, selector: used for requests that don't say; "auto" takes what was calibrated and tuned for the store.
        max_kl, min_top1: the bound that requests keep which give neither a ratio nor a bound, by what `calibrate` predicts; see
            `docs/calibration.md`.
        least_reused: prompts for which reuse would save fewer tokens are left to vLLM, which reads them as fast. "auto": what
            the server measures of itself decides (`measured.py`), and before that what `cachetune_rag.reuse.worth` says for the device.
        loads_at_once: prompts that may wait for their keys and values at the same time, each with its pages of vLLM's cache.
        prompt_memory: bytes of the device that the keys and values of the prompts at hand take at most; "auto": those of one of the server's longest
            prompts, as far as vLLM leaves room.
        store_missed: whether chunks that a request names and the store lacks are stored behind it.
    """

    store: str
    tenant: str = ""
    tenant_from_request: bool = False
    codec: str = "exact"
    host_budget: int | str = "4GiB"
    disk_budget: int | str = "64GiB"
    device_budget: int | str = 0
    read_timeout: float | None = 30.0
    remote: str | None = None
    remote_codec: str | None = None
    store_key: str | None = None
    encrypt: bool | None = None
    lead_in: Any = "auto"
    ratio: float | str = "auto"
    selector: str = "auto"
    max_kl: float | None = None
    min_top1: float | None = None
    least_reused: int | str = "auto"
    loads_at_once: int = 8
    prompt_memory: int | str = "auto"
    store_missed: bool = True

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The settings in `kv_connector_extra_config`.

        Raises:
            ConfigError: a name that doesn't exist, no store, or a value that can't be used.
        """
        _check_names(given, (each.name for each in fields(cls)), "kv_connector_extra_config", ConfigError)
        if not isinstance(given.get("store"), str) or not given["store"].strip():
            raise ConfigError(
                f"store is {shown(given.get('store'))}: give kv_connector_extra_config the folder of the store, such as "
                '{"store": "/data/kv"}; `cachetune precompute DOCUMENTS --model MODEL --store FOLDER` fills it.'
            )
        settings = cls(**given)
        if settings.least_reused != "auto":
            check_count(settings.least_reused, "least_reused", '"auto" or a whole number from 0 on', 0)
        check_count(settings.loads_at_once, "loads_at_once", "a whole number from 1 on", 1)
        _check_prompt_memory(settings.prompt_memory)
        for name in ("tenant_from_request", "store_missed"):
            if not isinstance(getattr(settings, name), bool):
                raise ConfigError(f"{name} is {shown(getattr(settings, name))}: use true or false.")
        if settings.remote is not None and (not isinstance(settings.remote, str) or not settings.remote.strip()):
            raise ConfigError(
                f"remote is {shown(settings.remote)}: use a URL such as s3://BUCKET/PREFIX, or leave it out."
            )
        _check_store_settings(settings)
        if settings.store_key is not None and not isinstance(settings.store_key, str):
            raise ConfigError(
                f"store_key is of type {type(settings.store_key).__name__}: use the path of the file that holds the key, or env:NAME."
            )
        if not isinstance(settings.encrypt, bool | None):
            raise ConfigError(f"encrypt is {shown(settings.encrypt)}: use true or false, or leave it out.")
        check_tenant(settings.tenant)
        _check_ratio(settings.ratio, ConfigError)
        _check_selector(settings.selector, ConfigError)
        _check_bound(settings.selector, settings.ratio, settings.max_kl, settings.min_top1, ConfigError)
        return settings

    @property
    def place(self) -> dict[str, Any]:
        """Arguments of `ChunkStore` that say where the store is and how it is opened, in every process of the server."""
        return {
            "path": self.store,
            "remote": self.remote,
            "remote_codec": self.remote_codec,
            "store_key": self.store_key,
            "encrypt": self.encrypt,
        }


@dataclass(frozen=True)
class RequestSettings:
    """Settings of one request.

    Attributes:
        chunks: texts of the chunks that stand in the prompt; None: those that are stored are looked for.
        ratio, selector, max_kl, min_top1: see `ServerSettings`.
        tenant: whose chunks may be used.
        reuse: False leaves the whole request to vLLM.
        explain: whether the response says what became of every token and chunk, and not only how many.
    """

    chunks: tuple[str, ...] | None
    ratio: float | str
    selector: str
    tenant: str
    reuse: bool
    explain: bool = False
    max_kl: float | None = None
    min_top1: float | None = None

    @property
    def bounded(self) -> bool:
        """Whether the ratio is found by a bound, when the prompt's tokens are scored."""
        return self.max_kl is not None or self.min_top1 is not None

    @classmethod
    def of(cls, given: object, server: ServerSettings) -> Self:
        """The settings of a request.

        Args:
            given: what its `kv_transfer_params` hold under "cachetune"; None for nothing.
            server: what holds where the request doesn't say.

        Raises:
            RequestSettingsError: names what can't be used, and what can.
        """
        if given is None:
            given = {}
        if not isinstance(given, Mapping):
            raise RequestSettingsError(
                f"{REQUEST_KEY} is {shown(given)}: use an object with {', '.join(_REQUEST_NAMES)}, each of them optional."
            )
        _check_names(given, _REQUEST_NAMES, f"a request's {REQUEST_KEY} settings", RequestSettingsError)
        selector = given.get("selector", server.selector)
        # A ratio and a bound exclude each other, so a request that gives one of them has nothing of that kind from the server.
        source: Mapping[str, Any] = given
        if not any(name in given for name in ("ratio", *BOUNDS)):
            source = {name: getattr(server, name) for name in ("ratio", *BOUNDS)}
        ratio, max_kl, min_top1 = source.get("ratio", "auto"), source.get("max_kl"), source.get("min_top1")
        _check_ratio(ratio, RequestSettingsError)
        _check_selector(selector, RequestSettingsError)
        if source is not given and "selector" in given and not _predicts(selector):
            max_kl = min_top1 = None  # nor has one whose selector can keep none
        _check_bound(selector, ratio, max_kl, min_top1, RequestSettingsError)
        reuse, explain = given.get("reuse", True), given.get("explain", False)
        for name, value in (("reuse", reuse), ("explain", explain)):
            if not isinstance(value, bool):
                raise RequestSettingsError(f"{name} is {shown(value)}: use true or false.")
        return cls(
            _texts(given.get("chunks")), ratio, selector, _tenant(given, server), reuse, explain, max_kl, min_top1
        )


def _check_store_settings(settings: ServerSettings) -> None:
    """Refuse what the store or the engine would refuse only when vLLM has loaded the model."""
    # They load NumPy and more: only when needed.
    from cachetune_rag.concurrency.deadline import check_timeout
    from cachetune_store.codecs import codec_names
    from cachetune_store.units import parse_bytes

    for name in ("codec", "remote_codec"):
        codec = getattr(settings, name)
        if codec not in codec_names() and not (codec is None and name == "remote_codec"):
            raise ConfigError(f"{name} is {shown(codec)}: use one of {', '.join(codec_names())}.")
    for name in ("host_budget", "disk_budget", "device_budget"):
        try:
            parse_bytes(getattr(settings, name), name)
        except StoreError as error:
            raise ConfigError(f"{error}.") from error
    check_timeout(settings.read_timeout)


def _check_prompt_memory(given: int | str) -> None:
    from cachetune_store.units import parse_bytes

    if given == "auto" and isinstance(given, str):
        return
    try:
        count = parse_bytes(given, "prompt_memory")
    except StoreError as error:
        raise ConfigError(f'{error}; or "auto".') from error
    if count == 0:
        raise ConfigError(
            f'prompt_memory is {shown(given)}, so no prompt could reuse chunks: use "auto" or bytes such as "8GiB".'
        )


_REQUEST_NAMES = tuple(each.name for each in fields(RequestSettings))


def _texts(chunks: object) -> tuple[str, ...] | None:
    if chunks is None:
        return None
    if isinstance(chunks, str | bytes) or not isinstance(chunks, Sequence):
        raise RequestSettingsError(f"chunks is {shown(chunks)}: use a list of the texts that stand in the prompt.")
    try:
        return tuple(check_text(text, f"chunks[{number}]") for number, text in enumerate(chunks))
    except PromptError as error:
        raise RequestSettingsError(str(error)) from error


def _tenant(given: Mapping[str, Any], server: ServerSettings) -> str:
    if "tenant" not in given:
        return server.tenant
    if not server.tenant_from_request:
        raise RequestSettingsError(
            "tenant can't be named by a request of this server: leave it out, or start the server with "
            '"tenant_from_request": true behind a gateway that sets it.'
        )
    try:
        check_tenant(given["tenant"])
    except ConfigError as error:
        raise RequestSettingsError(str(error)) from error
    return str(given["tenant"])


def _check_names(given: Mapping[str, Any], known: Iterable[str], whose: str, refusal: type[ConfigError]) -> None:
    names = list(known)
    for name in given:
        if name not in names:
            advice = hint(str(name), names, f"there are {', '.join(names)}.")
            raise refusal(f"{shown(name)} is none of {whose}: {advice}")


def _check_ratio(ratio: object, refusal: type[ConfigError]) -> None:
    if ratio == "auto" and isinstance(ratio, str):
        return
    if not is_number(ratio, 0, 1):
        raise refusal(
            f'ratio is {shown(ratio)}: use "auto" or a number from 0 (recompute nothing) to 1 (recompute everything).'
        )


def _check_selector(selector: object, refusal: type[ConfigError]) -> None:
    from cachetune_rag.selection import selector_names  # it loads torch: only when needed

    if selector != "auto" and (not isinstance(selector, str) or selector not in selector_names()):
        raise refusal(f'selector is {shown(selector)}: use "auto" or one of {", ".join(selector_names())}.')


def _predicts(selector: str) -> bool:
    """Whether a selector says something that a bound can be kept by."""
    from cachetune_rag.selection import get_selector, names

    return get_selector(names.DEFAULT if selector == "auto" else selector).predicts


def _check_bound(selector: str, ratio: object, max_kl: object, min_top1: object, refusal: type[ConfigError]) -> None:
    if max_kl is None and min_top1 is None:
        return
    from cachetune_rag.reuse.config import check_bound  # it loads torch: only when needed

    try:
        check_bound(selector, ratio, max_kl, min_top1)
    except ConfigError as error:
        raise refusal(str(error)) from error
