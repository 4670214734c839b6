"""The tree of errors is as its module documents it, and frameworks swallow none of them."""

from __future__ import annotations

import inspect
import re

import pytest

import cachetune_rag
import cachetune_store
from cachetune_rag import CacheTuneError, ConfigError, Document, errors


def test_the_documented_tree_is_the_real_one() -> None:
    documented: list[tuple[str, str]] = []
    above: list[tuple[int, str]] = []
    for indent, name in re.findall(r"^( *)[*x+] (\w+)", errors.__doc__ or "", re.MULTILINE):
        above = [(depth, parent) for depth, parent in above if depth < len(indent)]
        documented.append((name, above[-1][1] if above else "Exception"))
        above.append((len(indent), name))
    real = [
        (name, kind.__bases__[0].__name__)
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, Exception)
    ]
    assert sorted(documented) == sorted(real)


def test_no_error_is_one_that_frameworks_turn_into_an_empty_answer() -> None:
    found = [CacheTuneError]
    for kind in found:
        found += kind.__subclasses__()
        assert not issubclass(kind, ValueError | TypeError)


def test_the_package_names_what_the_store_raises_at_its_users() -> None:
    inside = {"IndexDamagedError", "UnknownCodecError", "UnknownFormatError"}  # answered by the store or the engine
    store = {name for name in cachetune_store.__all__ if name.endswith("Error")} - inside
    assert store <= set(cachetune_rag.__all__)
    assert all(getattr(cachetune_rag, name) is getattr(cachetune_store, name) for name in store)


@pytest.mark.parametrize(
    "chunks", ["text", b"bytes", None, 3, {"a": "b"}, ["a", None], ["a", 3], (c for c in ("a", 4))]
)
def test_chunks_of_another_type_are_named(chunks: object) -> None:
    with pytest.raises(ConfigError, match=r"document 'd': chunks.*use a list of strings"):
        Document("d", chunks)  # type: ignore[arg-type]


def test_a_generator_of_chunks_is_consumed_once_and_kept() -> None:
    document = Document("d", (c for c in ("one", "two")))  # type: ignore[arg-type]
    assert document.chunks == ("one", "two")
    assert document == Document("d", ["one", "two"])
