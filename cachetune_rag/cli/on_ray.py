"""`cachetune precompute --ray`: the same job on a Ray cluster, by `cachetune_ray`, which stands above this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from cachetune_rag.checking.escaping import visible_line
from cachetune_rag.cli.console import UsageError, note, number, size
from cachetune_rag.cli.meter import Meter
from cachetune_rag.cli.session import Loading
from cachetune_rag.text.files.left_out import LeftOut
from cachetune_store.printing import without_password


@dataclass
class RayJob:
    """A run on a cluster.

    Attributes:
        paths: files, folders and URLs of the corpus.
        store: a folder, or a URL.
        loading: which model.
        address: of the cluster, as `ray.init` takes it; "local": a new one on this machine.
        actors: how many; None: one a GPU.
        chunk_tokens: most tokens of a chunk.
        options: of the store.
        done: what is done so far (`cachetune_ray.RaySummary`); None: nothing.
        interrupted: what ended it before its end.
        total: bytes of the corpus.
        left_out: files that are not read.
    """

    paths: Sequence[str]
    store: str
    loading: Loading
    address: str
    actors: int | None
    chunk_tokens: int
    options: Mapping[str, Any]
    done: Any = None
    interrupted: KeyboardInterrupt | None = None
    total: int = 1
    left_out: LeftOut = field(default_factory=LeftOut)

    def run(self) -> None:
        """Connect to the cluster and precompute. Ctrl-C ends the run; what is stored stays.

        Raises:
            UsageError: Ray is not installed, or there is no cluster at the address.
            CacheTuneError, StoreError: the corpus, the model or the store can't be used.
        """
        ray = _ray()
        sources = import_module("cachetune_ray.sources")
        try:
            ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"--ray is {visible_line(self.address)!r}, and there is no cluster ({error}): give an address such as auto (the one that "
                "runs on this machine or that RAY_ADDRESS names), 10.0.0.1:6379 or ray://10.0.0.1:10001, or local to start one here."
            ) from error
        try:
            self._precompute(ray, sources)
        except KeyboardInterrupt as error:
            self.interrupted = error.with_traceback(None)
        finally:
            ray.shutdown()

    def _precompute(self, ray: Any, sources: Any) -> None:
        corpus = sources.Sources.scan(self.paths)
        self.left_out, self.total = corpus.left_out, max(1, corpus.size)
        for line in self.left_out.needs():
            note(line)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # two things that draw one line would draw over each other
        context.print_on_execution_start = False
        note(f"Precomputing {size(corpus.size)} into {visible_line(without_password(self.store))} on a Ray cluster ...")
        with Meter("Precomputing") as meter:

            def progress(done: Any) -> None:
                self.done = done
                rate = f"{done.tokens_per_second:,.0f} tok/s"
                workers = number(done.workers, "worker")
                meter.update(
                    f"{number(done.documents, 'doc')} · {rate} · {size(done.bytes)} · {workers}",
                    min(done.size, self.total),
                    self.total,
                    line=f"{number(done.documents, 'document')}, {rate}, {size(done.bytes)} stored, {workers}",
                )

            self.done = import_module("cachetune_ray").precompute(
                corpus.dataset(),
                self.loading.model,
                self.store,
                actors=self.actors,
                chunk_tokens=self.chunk_tokens,
                gguf_file=self.loading.gguf_file,
                dtype=self.loading.dtype,
                device=self.loading.device,
                tenant=self.loading.tenant,
                lead_in=self.loading.lead_in,
                same_model_only=True,
                progress=progress,
                **self.options,
            )


def _ray() -> Any:
    """Ray.

    Raises:
        UsageError: it isn't installed.
    """
    try:
        ray = import_module("ray")
        import_module("ray.data")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--ray needs {error.name}, which is not installed: pip install 'cachetune-rag[ray]', here and on the cluster's machines."
        ) from error
    return ray
