"""A user's own prompts, to measure with: checked, built, and with all their chunks in the store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cachetune_rag.checking.arguments import is_iterable
from cachetune_rag.chunks.owners import ChunkToStore
from cachetune_rag.errors import ConfigError, PromptError
from cachetune_rag.text.prompts.prompt import Prompt
from cachetune_store import ChunkKey
from cachetune_store.printing import shown

if TYPE_CHECKING:
    from cachetune_rag.engine import CacheTune


def prompts_of(engine: CacheTune, samples: Iterable[Any]) -> list[Prompt]:
    """Prompts of samples: dicts (or objects) with query, chunks and perhaps prefix, as for `generate`; or prompts.

    Raises:
        ConfigError, PromptError: there is none, or one of them can't be used; the message says which and why.
    """
    if isinstance(samples, str | bytes | Mapping) or not is_iterable(samples):
        raise ConfigError(
            f"samples is {shown(samples)}, a {type(samples).__name__}: use a list of dicts with query and chunks, or of Prompts."
        )
    prompts = [_prompt(engine, number, sample) for number, sample in enumerate(samples, start=1)]
    if not prompts:
        raise ConfigError("there are no samples: give some of your own prompts (10 to 50 are a good number).")
    return prompts


def store_chunks(engine: CacheTune, prompts: Sequence[Prompt]) -> set[str]:
    """Precompute the prompts' chunks that aren't stored. Computed in a request they would be exact, and not reused at all.

    Storing the first ones of a store may choose lead-ins, so that others have to be stored once more.

    Returns:
        The codecs of those that were stored before.
    """
    engine.flush()  # chunks that are just being stored can't be stored here
    while True:
        namespace = engine.namespace
        codecs = _store_missing(engine, prompts)
        if engine.namespace == namespace:
            return codecs


def _store_missing(engine: CacheTune, prompts: Sequence[Prompt]) -> set[str]:
    missing: dict[ChunkKey, ChunkToStore] = {}
    codecs: set[str] = set()
    for prompt in prompts:
        for ids, text, document, since in zip(
            prompt.chunk_ids, prompt.chunk_texts, prompt.chunk_documents, prompt.chunk_since, strict=True
        ):
            if not ids or (key := engine.runtime.assembler.key(ids)) in missing:
                continue
            reader = engine.store.open(key)
            if reader is None:
                missing[key] = ChunkToStore(ids, text, {document: since})
            else:
                with reader:
                    codecs.add(reader.layout.codec)
    if missing:
        engine.runtime.precomputer.store_chunks(missing.values())
    return codecs


def _prompt(engine: CacheTune, number: int, sample: Any) -> Prompt:
    try:
        prompt = (
            engine.runtime.admission.prompt(None, (), None, sample)
            if isinstance(sample, Prompt)
            else _build(engine, sample)
        )
    except PromptError as error:
        raise type(error)(f"sample {number}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"sample {number}: {error}") from error
    if not any(prompt.chunk_ids):
        raise ConfigError(f"sample {number} has no chunks, so nothing could be reused: leave it out.")
    if len(prompt.ids) <= engine.adapter.reuse_beyond:
        raise ConfigError(
            f"sample {number} has {len(prompt.ids)} tokens; this model's prompts of up to "
            f"{engine.adapter.reuse_beyond} are computed whole: use longer samples."
        )
    return prompt


def _build(engine: CacheTune, sample: Any) -> Prompt:
    if isinstance(sample, Mapping):
        unknown = sorted(set(map(str, sample)) - {"query", "chunks", "prefix"})
        if unknown:
            raise ConfigError(f"it has the key {shown(unknown[0])}: use query, chunks and prefix.")
        values = [sample.get(name) for name in ("query", "chunks", "prefix")]
    else:
        values = [getattr(sample, name, None) for name in ("query", "chunks", "prefix")]
    query, chunks, prefix = values
    if not isinstance(query, str) or isinstance(chunks, str) or not isinstance(chunks, Sequence):
        raise ConfigError(
            f"it is {shown(sample)}: use a dict (or an object) with query, a string, and chunks, a list of strings; "
            "or a Prompt."
        )
    return engine.runtime.admission.prompt(query, chunks, prefix, None)
