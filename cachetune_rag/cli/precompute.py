"""`cachetune precompute`: run a corpus through the model and store it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachetune_rag.checking.escaping import visible_line
from cachetune_rag.cli import options
from cachetune_rag.cli.console import UsageError, emit_json, guarded, note, number, size, stdout
from cachetune_rag.cli.corpus_job import CorpusJob
from cachetune_rag.cli.interrupts import line_for, status_for
from cachetune_rag.cli.on_ray import RayJob
from cachetune_rag.cli.session import Loading, load_engine, open_for_writing
from cachetune_rag.text.files.corpus import Corpus, CorpusError
from cachetune_rag.text.files.readers import SUFFIXES
from cachetune_rag.text.splitting import DEFAULT_CHUNK_TOKENS, MIN_CHUNK_TOKENS, Splitter
from cachetune_store.printing import shown, without_password
from cachetune_store.storekey import StoreKey

if TYPE_CHECKING:
    from cachetune_rag.engine import CacheTune
    from cachetune_rag.report import PrecomputeSummary
    from cachetune_rag.text.files.left_out import LeftOut

LEAD_INS = ("auto", "first-token")
RAY = "Ray"

EPILOG = (
    "[bold]Examples[/bold]\n\n\b\n"
    "  cachetune precompute docs/ --model ./my-model --store kv-store\n"
    "  cachetune precompute a.md faq.jsonl -m ./my-model -s kv-store --codec int8\n"
    "  cachetune precompute docs/ -m ./folder --gguf-file model-q8.gguf -s kv-store\n"
    "  cachetune precompute s3://bucket/corpus/ -m org/name -s s3://bucket/kv --ray auto\n\n"
    "[bold]JSONL[/bold]: each line is an object with an id and either a text, which is split, or chunks, which are kept "
    "as they are.\n\n\b\n"
    '  {"id": "faq-1", "text": "To reset it, hold the button."}\n'
    '  {"id": "faq-2", "chunks": ["First passage.", "Second passage."]}\n\n'
    "Run the same command again after an interruption: what is stored is skipped."
)


@guarded
def precompute(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH",
            help=f"Files of text, Markdown, JSONL, CSV, HTML or PDF, or folders of them ({' '.join(SUFFIXES)}).",
            show_default=False,
        ),
    ],
    model: options.Model,
    store: options.StoreOrUrl,
    chunk_tokens: Annotated[
        int,
        typer.Option(
            "--chunk-tokens",
            min=MIN_CHUNK_TOKENS,
            help="Most tokens of a chunk. Texts are split at paragraphs, then sentences, then lines, then words.",
        ),
    ] = DEFAULT_CHUNK_TOKENS,
    lead_in: Annotated[
        str,
        typer.Option(
            "--lead-in",
            metavar="HOW",
            help="What stands before each chunk while it is computed. auto: stretches of your own texts, of which the mean "
            "is stored; first-token: the prompt's first token alone, a quarter of the work.",
        ),
    ] = "auto",
    tenant: options.Tenant = "",
    gguf_file: options.GgufFile = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    codec: options.Codec = "exact",
    host_budget: options.HostBudget = "0",
    disk_budget: options.DiskBudget = options.DISK_BUDGET,
    remote: options.Remote = None,
    remote_codec: options.RemoteCodec = None,
    store_key: options.StoreKey = None,
    encrypt: options.Encrypt = False,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Compute on a Ray cluster: auto (the one that runs here, or that RAY_ADDRESS names), HOST:PORT, ray://HOST:PORT, or "
            "local (on this machine). PATH may then be a URL or Parquet, and --store a URL such as s3://BUCKET/PREFIX.",
            show_default=False,
            rich_help_panel=RAY,
        ),
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(
            "--actors",
            min=1,
            help="Processes that compute on the cluster. Left out: one a GPU, or one where there is none.",
            show_default=False,
            rich_help_panel=RAY,
        ),
    ] = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Run documents through the model once and store them for later questions.

    A file is a document, named by its path below PATH; in a JSONL file every line is one. Documents that changed are
    replaced, and what is stored already is skipped. What was left out is named at the end.
    """
    if lead_in not in LEAD_INS:
        raise UsageError(f"--lead-in is {shown(lead_in)}: use {' or '.join(LEAD_INS)}.")
    loading = Loading(model, gguf_file, dtype, device, tenant, lead_in.replace("-", "_"))
    if ray is not None:
        _on_ray(
            RayJob(
                paths,
                str(store),
                loading,
                ray,
                actors,
                chunk_tokens,
                {
                    "codec": codec,
                    "host_budget": host_budget,
                    "disk_budget": disk_budget,
                    "remote": remote,
                    "remote_codec": remote_codec,
                    "store_key": StoreKey.given(store_key),  # read here: the actors may be elsewhere
                    "encrypt": encrypt or None,
                },
            ),
            json_output,
        )
        return
    if actors is not None:
        raise UsageError(f"--actors is {actors}, but there is no --ray: actors run on a Ray cluster.")
    if isinstance(store, str):
        raise UsageError(
            f"--store is {(url := visible_line(without_password(store)))}, a URL: give a folder, with --remote {url}. Only with --ray may it be a URL."
        )
    corpus = Corpus.scan(paths)
    for line in corpus.left_out.needs():
        note(line)  # before the model loads: who wants those files read can stop here
    with (
        open_for_writing(
            store,
            codec=codec,
            host_budget=host_budget,
            disk_budget=disk_budget,
            remote=remote,
            remote_codec=remote_codec,
            store_key=store_key,
            encrypt=encrypt,
        ) as kv,
        load_engine(loading, kv) as engine,
    ):
        _check_fits(engine, chunk_tokens)
        note(f"Precomputing {number(len(corpus.files), 'file')} ({size(corpus.size)}) into {visible_line(store)} ...")
        job = CorpusJob(corpus, engine, Splitter(lambda text: len(engine.prompts.encode(text)), chunk_tokens))
        try:
            summary = job.run()
        finally:
            for line in corpus.left_out.lines():
                note(line)
        full = kv.stats().disk
        evicted = 0 if full is None else full.evictions
    if not (job.interrupted or summary.documents):
        raise CorpusError(f"no text in {', '.join(paths)}: every document is empty.")
    done = _Result(
        str(store),
        summary,
        job.interrupted,
        job.progress.done / job.progress.total,
        job.empty,
        job.empty_names,
        corpus.left_out,
        evicted,
        disk_budget,
    )
    done.tell(json_output)


def _on_ray(job: RayJob, json_output: bool) -> None:
    """The same on a cluster."""
    from cachetune_rag.report import PrecomputeSummary

    try:
        job.run()
    finally:
        if job.done is not None:
            job.left_out.failed += [(Path(name), why) for name, why in job.done.failed]
        for line in job.left_out.lines():
            note(line)
    done = job.done
    if not job.interrupted and not (done is not None and done.documents) and job.left_out.failed:
        raise CorpusError("nothing could be read; the lines above say why.")
    if not (job.interrupted or (done is not None and done.documents)):
        raise CorpusError(f"no text in {', '.join(job.paths)}: every document is empty.")
    summary = PrecomputeSummary(0, 0, 0, 0, 0, 0.0) if done is None else done.plain
    empty = () if done is None else done.empty
    share = 0.0 if done is None else min(1.0, done.size / job.total)
    evicted = 0 if done is None else done.evicted
    of_disk = str(job.options["disk_budget"])
    _Result(
        job.store, summary, job.interrupted, share, len(empty), list(empty[:3]), job.left_out, evicted, of_disk
    ).tell(json_output)


@dataclass(frozen=True)
class _Result:
    """What a run has done, and what of the corpus is not in the store.

    Attributes:
        store: as the user gave it.
        summary: what is stored.
        interrupted: what ended the run before its end.
        share: of the corpus that is done.
        empty, empty_names: how many documents had no text, and ids of some.
        left_out: files that were not read.
        evicted: chunks that had to make room.
        disk_budget: as the user gave it.
    """

    store: str
    summary: PrecomputeSummary
    interrupted: KeyboardInterrupt | None
    share: float
    empty: int
    empty_names: list[str]
    left_out: LeftOut
    evicted: int
    disk_budget: str

    def tell(self, json_output: bool) -> None:
        """Print it. Raises typer's exit if the run was interrupted."""
        self._note_gaps()
        if json_output:
            result = {
                "store": without_password(self.store),
                **self.summary.as_dict(),
                "empty": self.empty,
                "left_out": self.left_out.as_dict(),
                "evicted": self.evicted,
                "interrupted": self.interrupted is not None,
            }
            emit_json(result)
        else:
            stdout().print(_lines(self.summary))
        if self.interrupted is not None:
            raise typer.Exit(status_for(self.interrupted))

    def _note_gaps(self) -> None:
        if self.interrupted is not None:
            note(
                f"{line_for(self.interrupted)} at {100 * self.share:.0f}%. What is stored stays: run the same command again to resume."
            )
        if self.empty:
            named = ", ".join(map(visible_line, self.empty_names)) + (
                ", ..." if self.empty > len(self.empty_names) else ""
            )
            note(f"Left out {number(self.empty, 'empty document')}: {named}")
        if self.evicted:
            note(
                f"The store is full: {number(self.evicted, 'chunk')} had to make room, and will be computed again when needed. "
                f"A larger --disk-budget than {self.disk_budget} keeps them."
            )


def _check_fits(engine: CacheTune, chunk_tokens: int) -> None:
    limit = engine.adapter.max_positions
    if limit is not None and chunk_tokens + 1 > limit:  # behind the first token at least
        raise UsageError(
            f"--chunk-tokens is {chunk_tokens}, but the model reads at most {limit} tokens: use {limit - 1} or fewer (a "
            "quarter of that leaves room for several chunks)."
        )


def _lines(summary: PrecomputeSummary) -> str:
    return (
        f"{number(summary.documents, 'document')}: {number(summary.chunks, 'new chunk')}, {summary.skipped:,} skipped "
        f"(stored before)\n{number(summary.tokens, 'token')} at {summary.tokens_per_second:,.0f} tokens/s, "
        f"{size(summary.bytes)} in {summary.seconds:,.1f} s"
        f"{f', each chunk behind {summary.lead_ins} lead-ins' if summary.lead_ins > 1 else ''}"
    )
