"""The command line: `cachetune`, or `python -m cachetune_rag`. Each command is a file of this folder."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cachetune_rag import __version__
from cachetune_rag.checking.escaping import visible_line
from cachetune_rag.cli.ask import EPILOG as ASK_EPILOG
from cachetune_rag.cli.ask import ask
from cachetune_rag.cli.calibrate import EPILOG as CALIBRATE_EPILOG
from cachetune_rag.cli.calibrate import calibrate
from cachetune_rag.cli.change_key import EPILOG as CHANGE_KEY_EPILOG
from cachetune_rag.cli.change_key import change_key
from cachetune_rag.cli.console import ERROR, print_error, warnings_on_stderr
from cachetune_rag.cli.explain import EPILOG as EXPLAIN_EPILOG
from cachetune_rag.cli.explain import RESPONSE_EPILOG, explain, explain_response
from cachetune_rag.cli.interrupts import status_for
from cachetune_rag.cli.output import OutputError, give_up, open_missing_streams, results_on_stdout
from cachetune_rag.cli.precompute import EPILOG as PRECOMPUTE_EPILOG
from cachetune_rag.cli.precompute import precompute
from cachetune_rag.cli.prune import EPILOG as PRUNE_EPILOG
from cachetune_rag.cli.prune import prune
from cachetune_rag.cli.serve import ANYTHING, serve
from cachetune_rag.cli.serve import EPILOG as SERVE_EPILOG
from cachetune_rag.cli.stats import EPILOG as STATS_EPILOG
from cachetune_rag.cli.stats import stats
from cachetune_rag.cli.tune import EPILOG as TUNE_EPILOG
from cachetune_rag.cli.tune import tune
from cachetune_rag.cli.upkeep import REMOVE_EPILOG, VERIFY_EPILOG, remove, verify

_HELP = (
    "Answer questions over your documents sooner.\n\n"
    "Run the documents through the model once ([bold]precompute[/bold]) and keep the result in a store; every question "
    "([bold]ask[/bold]) then reuses it, instead of reading the documents again."
)
_EPILOG = (
    "[bold]A first run[/bold]\n\n\b\n"
    "  cachetune precompute docs/ --model ./my-model --store kv-store\n"
    '  cachetune ask "How do I reset it?" --model ./my-model --store kv-store\n'
    "  cachetune stats --store kv-store\n\n"
    "'cachetune COMMAND --help' explains a command. Set CACHETUNE_DEBUG=1 for full tracebacks."
)


class _Group(TyperGroup):
    """Commands whose usage errors are made safe to print, because an argument may contain control characters."""

    def make_context(self, *arguments: Any, **named: Any) -> Any:
        with _escaped_usage_errors():
            return super().make_context(*arguments, **named)

    def invoke(self, ctx: Any) -> Any:
        with _escaped_usage_errors():
            return super().invoke(ctx)


@contextlib.contextmanager
def _escaped_usage_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Usage errors of click. Releases of typer have it under different module names, so they are known by this method.
        if hasattr(error, "format_message") and isinstance(message := getattr(error, "message", None), str):
            error.message = visible_line(message)  # type: ignore[attr-defined]
        raise


# cli/console.py decides about tracebacks, so typer's are off.
app = typer.Typer(
    name="cachetune",
    cls=_Group,
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(command: Callable[..., None], epilog: str, settings: dict[str, Any] | None = None) -> None:
    # Help keeps line ends, so each paragraph of a docstring is made one line, which the terminal wraps.
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    text = "\n\n".join(" ".join(p.split()) for p in paragraphs)
    app.command(help=text, epilog=epilog, context_settings=settings)(command)


_add(precompute, PRECOMPUTE_EPILOG)
_add(ask, ASK_EPILOG)
_add(explain, EXPLAIN_EPILOG)
_add(explain_response, RESPONSE_EPILOG)
_add(calibrate, CALIBRATE_EPILOG)
_add(tune, TUNE_EPILOG)
_add(serve, SERVE_EPILOG, ANYTHING)
_add(stats, STATS_EPILOG)
_add(verify, VERIFY_EPILOG)
_add(remove, REMOVE_EPILOG)
_add(prune, PRUNE_EPILOG)
_add(change_key, CHANGE_KEY_EPILOG)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cachetune {__version__}")
        raise typer.Exit


@app.callback(help=_HELP)
def _cachetune(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 damage found by verify, 2 an error, 130 interrupted, 143 terminated.

    Args:
        arguments: the words behind the program's name; None: those of this process.
    """
    open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # An answer may contain characters that the terminal's encoding lacks.
            stream.reconfigure(errors="replace")
    try:
        with warnings_on_stderr(), results_on_stdout():
            app(args=None if arguments is None else list(arguments), prog_name="cachetune")
    except BrokenPipeError:
        # The reader (head, less) has closed the pipe. Nothing may be flushed into it at exit.
        give_up(sys.stdout)
        sys.exit(1)
    except OutputError as error:
        print_error(error)
        sys.exit(ERROR)
    except KeyboardInterrupt as error:
        sys.exit(status_for(error))
