"""The options of an engine and its store, each declared once: default, explanation and, where it has one, its command-line option.

The constructor, `docs/options.md` and the command line read them from here. Nothing here imports torch, so that
`cachetune --help` starts quickly.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self, TypedDict

from cachetune_rag.checking.arguments import hint
from cachetune_rag.errors import ConfigError
from cachetune_store.printing import shown
from cachetune_store.storekey import StoreKey

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CommandLineOption:
    """How an option is written and explained on the command line, where there is less room."""

    flag: str
    metavar: str
    help: str


def option(default: Any, help: str, cli: CommandLineOption | None = None) -> Any:
    """A field of an options class.

    Args:
        default: its value where nothing is given.
        help: what it does, for the documentation.
        cli: its option on the command line; None: it has none that is the same for all commands.
    """
    return field(default=default, metadata={"help": help, "cli": cli})


@dataclass(frozen=True, kw_only=True)
class TierOptions:
    """What a store and an engine that opens one both take."""

    codec: str = option(
        "exact",
        "how new chunks are encoded: `exact`, `int8`, `fp8` or `int4`; chunks of every codec can be read.",
        CommandLineOption(
            "--codec",
            "NAME",
            "How new chunks are stored: exact; int8 or fp8 (half the bytes of 16-bit numbers, int8 being nearly exact); "
            "int4 (a bit more than a quarter, coarser).",
        ),
    )
    host_budget: int | str = option(
        "4GiB",
        'bytes of host memory for chunks, as an int or a text such as "4GiB"; 0: none.',
        CommandLineOption("--host-budget", "BYTES", "Memory that keeps chunks at hand, such as 4GiB or 500MB."),
    )
    disk_budget: int | str = option(
        "64GiB",
        "bytes of all chunk files together; the chunks that were used longest ago make room.",
        CommandLineOption("--disk-budget", "BYTES", "Most bytes of the store; the chunks used longest ago make room."),
    )
    device_budget: int | str = option(
        0,
        "bytes of the GPU's memory for chunks in use, as encoded; 0: none. Their deviations stay in host memory beside, and are in no budget: for an 8B model "
        "3% of it in `int4`, 0.8% in `exact`.",
        CommandLineOption(
            "--device-budget",
            "BYTES",
            "Memory of the GPU that keeps chunks in use at hand, beside the model; 0: none.",
        ),
    )
    read_memory: int | str | None = option(
        None,
        "bytes of host memory that are kept for the next reads from disk, because new memory is slow to touch and to "
        "page-lock; None: an eighth of `host_budget`, and 256 MiB at least.",
    )
    pin_memory: bool | None = option(
        None, "page-lock host memory, which makes copies to a GPU faster; None: if there is CUDA."
    )
    direct_io: bool | None = option(None, "read past the page cache; None: where the file system supports it.")
    remote: str | None = option(
        None,
        "URL of a place that many machines share, behind the store's folder ([scale.md](scale.md)): `s3://bucket/prefix`, `gs://...`, `az://...`, "
        "`file:///folder`, `valkey://host:6379`. The store itself may be such a URL, without a folder.",
        CommandLineOption(
            "--remote",
            "URL",
            "A place that many machines share, behind the store: s3://BUCKET/PREFIX, gs://..., az://..., file:///FOLDER or valkey://HOST:PORT.",
        ),
    )
    remote_codec: str | None = option(
        None,
        "how chunks are encoded in the shared place; None: as in the store. `int4` there takes a quarter of the network and of the room.",
        CommandLineOption(
            "--remote-codec", "NAME", "How chunks are stored in the shared place; left out: as in the store."
        ),
    )
    remote_timeout: float = option(
        5.0,
        "seconds that a read from the shared place may take, further tries included; then the chunk is computed (`Report.unreadable`).",
    )
    remote_options: Mapping[str, Any] | None = option(
        None,
        "further arguments for what reaches the shared place: of obstore's `from_url` for buckets (such as `endpoint`), of "
        "`GlideClientConfiguration` for servers.",
    )
    store_key: bytes | str | os.PathLike[str] | StoreKey | None = field(
        default=None,
        repr=False,
        metadata={
            "help": "the store's key, which shows what others have forged or swapped in its files ([SECURITY.md](../SECURITY.md)): 32 random bytes or "
            'more, the path of the file that holds them, or `"env:NAME"` for an environment variable. A store made with a key opens '
            "with it only. None: there is none.",
            "cli": CommandLineOption(
                "--store-key",
                "FILE",
                "File with the store's key, or env:NAME for an environment variable; for a store made with one, or a new one.",
            ),
        },
    )
    encrypt: bool | None = option(
        None,
        "whether a new store is encrypted with its key, in its folder and in the shared place ([SECURITY.md](../SECURITY.md#encryption)); it needs "
        "`cachetune-rag[encryption]`. A store that is there says itself whether it is, and stays so; True refuses one that isn't. None: a new one "
        "isn't, unless it is a folder before a shared place that is.",
        CommandLineOption(
            "--encrypt", "", "Encrypt a new store with its key, and refuse one that isn't. Needs --store-key."
        ),
    )


@dataclass(frozen=True, kw_only=True)
class StoreOptions(TierOptions):
    """Arguments of `ChunkStore`, except its path."""

    device: str | torch.device | None = option(  # noqa: RUF009 (it makes a dataclass field)
        None,
        "the device that `device_budget` is for; None: the current CUDA device, or the model's where an engine opens the store.",
    )


@dataclass(frozen=True, kw_only=True)
class EngineOptions(TierOptions):
    """Arguments of `CacheTune` and `CacheTune.from_pretrained`, except the model, its tokenizer and the store."""

    prompt_template: str | None = option(
        None, "text with `{prefix}`, `{chunks}` and `{query}`; None: the tokenizer's chat template."
    )
    chat_template_kwargs: Mapping[str, Any] | None = option(
        None,
        'variables of the chat template for every prompt that doesn\'t give its own, such as `{"enable_thinking": False}`. '
        "`chat_template` among them is the name of another of the tokenizer's templates, or a template's text.",
    )
    chunk_separator: str = option("\n\n", "text between chunks; it is computed in every request, and never stored.")
    lead_in: Sequence[int] | Sequence[Sequence[int]] | str = option(
        "auto",
        """tokens that stand before a chunk while it is precomputed. "auto": stretches of the stored texts, once these have
        1,024 tokens, and the prompt's first token until then; the mean of the KV behind all stretches is stored. They are
        chosen once for a store, model and tenant. "first_token": the prompt's first token. Or token ids, or a list of
        several lists of token ids. Behind a single lead-in, KV is exact where the chunk stands right behind it.""",
    )
    tenant: str = option(
        "",
        "whose chunks these are; an engine never uses chunks of another tenant.",
        CommandLineOption(
            "--tenant",
            "NAME",
            "Whose documents and chunks; those of others are never used. Left out: those stored without a tenant.",
        ),
    )
    batch_tokens: int | None = option(
        None, "tokens that precompute runs at once; None: 8192 on a GPU, one chunk at a time on a CPU."
    )
    cuda_kernels: bool = option(
        True,
        "on a GPU that can (Ampere or newer, with Triton), run requests through this package's kernels, CUDA graphs and copy "
        "streams, which is several times faster ([gpu.md](gpu.md)). False: as on a CPU.",
    )
    fidelity_sample: float = option(
        0.0,
        "share of the answers, from 0 (off) to 1, that are compared with full prefill after they were given and while the model "
        "is idle; `stats()` has the result. The KV of up to two prompts is kept for it ([calibration.md](calibration.md)).",
    )
    read_timeout: float | None = option(
        30.0,
        "seconds that a request waits for the store's disk each time it needs it. Then it goes on without the disk, and computes "
        "what isn't in host memory. None: as long as it takes.",
    )

    @classmethod
    def of(cls, given: Mapping[str, Any], whose: str = "CacheTune") -> Self:
        """The options with these values.

        Args:
            given: names and values; options that are missing keep their default.
            whose: what takes them, for the message.

        Raises:
            ConfigError: there is no such option.
        """
        check_names(given, ENGINE_NAMES, whose)
        return cls(**given)


class EngineArguments(TypedDict, total=False):
    """`EngineOptions` for type checkers, which can't derive keyword arguments from a dataclass. A test compares both."""

    codec: str
    host_budget: int | str
    disk_budget: int | str
    device_budget: int | str
    read_memory: int | str | None
    pin_memory: bool | None
    direct_io: bool | None
    remote: str | None
    remote_codec: str | None
    remote_timeout: float
    remote_options: Mapping[str, Any] | None
    store_key: bytes | str | os.PathLike[str] | StoreKey | None
    encrypt: bool | None
    prompt_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    chunk_separator: str
    lead_in: Sequence[int] | Sequence[Sequence[int]] | str
    tenant: str
    batch_tokens: int | None
    cuda_kernels: bool
    fidelity_sample: float
    read_timeout: float | None


class RequestOptions(TypedDict, total=False):
    """What a request takes beside its query, chunks, prefix or prompt, and beside sampling settings."""

    ratio: float | str
    selector: str
    max_kl: float | None
    min_top1: float | None
    min_sure: float | None
    reuse: bool
    max_new_tokens: int | str | None
    stop: str | Sequence[str] | None
    generation_config: Any


REUSE_NAMES = ("ratio", "selector", "max_kl", "min_top1", "min_sure")
"""Arguments of a request that say how much is recomputed, what chooses it, and when reuse is given up."""
STORE_NAMES = tuple(each.name for each in fields(StoreOptions))
ENGINE_NAMES = tuple(each.name for each in fields(EngineOptions))
LOADING_NAMES = ("gguf_file", "device", "dtype", "revision")
"""Arguments of `CacheTune.from_pretrained` that say how the model is loaded."""
FROM_PRETRAINED_NAMES = (*LOADING_NAMES, *ENGINE_NAMES, *STORE_NAMES)
REQUEST_NAMES = ("query", "chunks", "prefix", "prompt", *RequestOptions.__annotations__)


def check_names(options: Mapping[str, Any], known: Iterable[str], whose: str) -> None:
    """Refuse an option that doesn't exist.

    Args:
        options: what was given.
        known: the names of all options.
        whose: what takes them, for the message.

    Raises:
        ConfigError: names the option, and the most similar one, or all of the store's options.
    """
    names = list(known)
    for name in options:
        if name not in names:
            advice = hint(name, names, f"the store has {', '.join(STORE_NAMES)}.")
            raise ConfigError(f"{shown(name)} is no argument of {whose}, nor of its store: {advice}")


def check_showable(options: Mapping[str, Any]) -> None:
    """Refuse a key itself among options that a framework keeps, because it shows them, writes them down and sends them to tracers.

    Raises:
        ConfigError: says what to give in its place.
    """
    if isinstance(options.get("store_key"), bytes):
        raise ConfigError(
            "store_key is bytes, and what is given here is shown, saved and traced: give the path of the file that holds the key, or env:NAME."
        )


def declared(name: str) -> Field[Any]:
    """The declaration of an option."""
    return next(each for each in (*fields(EngineOptions), *fields(StoreOptions)) if each.name == name)


def command_line_option(name: str) -> CommandLineOption:
    """How an option is written on the command line."""
    found = declared(name).metadata["cli"]
    if not isinstance(found, CommandLineOption):
        raise LookupError(f"the option {name} has no command-line option: give its declaration one")
    return found


def help_text(each: Field[Any]) -> str:
    """What an option does, as one paragraph."""
    return " ".join(each.metadata["help"].split())


def markdown() -> str:
    """The page docs/options.md."""
    rows = []
    for each in fields(EngineOptions):
        found = each.metadata["cli"]
        flag = f"`{found.flag}`" if found else ""
        text = help_text(each)
        rows.append(f"| `{each.name}` | `{each.default!r}` | {flag} | {text[0].upper() + text[1:]} |")
    return "\n".join(
        [
            "# Options of an engine",
            "Keyword arguments of `CacheTune(model, tokenizer, store, ...)` and of `CacheTune.from_pretrained(path, store, ...)`.",
            "Budgets and the other options of a store (from `codec` to `encrypt`) can't be given with a `ChunkStore` that is",
            "open already: set them there.",
            "",
            "| option | default | command line | meaning |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            "This page is made from `cachetune_rag/options.py`: `python -m cachetune_rag.options > docs/options.md`.",
        ]
    )


def _documented(options: type[TierOptions]) -> None:
    """Complete a class's docstring with its options."""
    lines = [
        textwrap.fill(f"{each.name}: {help_text(each)}", 120, initial_indent="    ", subsequent_indent="        ")
        for each in fields(options)
    ]
    summary = inspect.cleandoc(options.__doc__ or "")
    options.__doc__ = "\n".join(
        [summary, "", "Args:", *(re.sub(r"\[(.+?)\]\(.+?\)", r"docs/\1", line) for line in lines)]
    )


for _options in (StoreOptions, EngineOptions):
    _documented(_options)


if __name__ == "__main__":
    sys.stdout.write(markdown() + "\n")
