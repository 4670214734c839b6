"""Every argument of the store's public interface is given invalid values. Each raises a StoreError that says so, never another error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from odd_values import accepted, foreign, hard_values, odd_values
from store_samples import NAMESPACE, sample

import cachetune_store
from cachetune_store import (
    ChunkKey,
    ChunkLayout,
    ChunkStore,
    LayerSpec,
    RowFormat,
    StoreArgumentError,
    StoreError,
    get_codec,
    make_key,
    register_codec,
)
from cachetune_store.units import parse_bytes

SAMPLE = sample(1, tokens=9, layers=2)
NAME = "0" * 64
Call = Callable[[ChunkStore, Any], Any]


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChunkStore]:
    with ChunkStore(tmp_path / "kv" if request.param == "disk" else None, host_budget="1MB") as made:
        SAMPLE.put(made, text="a text")
        made.set_document("d", [SAMPLE.key])
        yield made


def given(**changes: Any) -> dict[str, Any]:
    other = sample(2, tokens=9, layers=2)
    plain = {name: getattr(other, name) for name in ("key", "layers", "scores", "namespace", "token_ids")}
    return {**plain, **changes}


def called(method: str, name: str) -> Call:
    return lambda s, v: getattr(s, method)(**given(**{name: v}))


def made(name: str) -> Call:
    return lambda s, v: ChunkStore(**{"path": None, name: v}).close()


def namespace(name: str) -> Call:
    return lambda s, v: replace(NAMESPACE, **{name: v}).digest


def read(method: str, place: int, count: int = 2) -> Call:
    def call(store: ChunkStore, value: Any) -> Any:
        with store.open(SAMPLE.key) as reader:  # type: ignore[union-attr]
            return getattr(reader, method)(*[value if i == place else 0 for i in range(count)])

    return call


def layout(name: str) -> Call:
    whole = {"tokens": 3, "layers": (LayerSpec(1, 2, 2),), "dtype": "float32", "codec": "exact"}
    return lambda s, v: ChunkLayout(**{**whole, name: v})


K, V = SAMPLE.layers[0]
CALLS: dict[str, Call] = {
    **{f"ChunkStore({name}=)": made(name) for name in ("codec", "host_budget", "disk_budget", "device_budget", "device", "read_memory", "pin_memory", "direct_io")},
    "ChunkStore(device=, device_budget=)": lambda s, v: ChunkStore(None, device=v, device_budget=5).close(),
    **{f"{method}({name}=)": called(method, name) for method in ("put", "encode") for name in ("key", "layers", "scores", "namespace", "token_ids", "text", "deviations")},
    "put(layers=[v])": lambda s, v: s.put(**given(layers=[v])),
    "put(layers=[(v, v)])": lambda s, v: s.put(**given(layers=[(v, v)])),
    "put(layers=[(k, v)])": lambda s, v: s.put(**given(layers=[(K, v)])),
    **{name: (lambda s, v, n=name: getattr(s, n)(v)) for name in ("write", "open", "open_in_memory", "foresee", "contains", "touch", "touch_host", "whole", "discard", "claim", "note", "tenants", "prune", "delete_tenant", "delete_document")},
    "open(errors=)": lambda s, v: s.open(SAMPLE.key, errors=v),
    "contains(lasting=)": lambda s, v: s.contains(SAMPLE.key, lasting=v),
    "claim([v])": lambda s, v: s.claim([v]),
    **{f"{name}(id)": (lambda s, v, n=name: getattr(s, n)(v, [SAMPLE.key])) for name in ("set_document", "extend_document")},
    **{f"{name}(keys)": (lambda s, v, n=name: getattr(s, n)("d", v)) for name in ("set_document", "extend_document")},
    **{f"{name}(tenant=)": (lambda s, v, n=name: getattr(s, n)("d", [SAMPLE.key], tenant=v)) for name in ("set_document", "extend_document")},
    "delete_document(tenant=)": lambda s, v: s.delete_document("d", tenant=v),
    "documents(tenant=)": lambda s, v: s.documents(tenant=v),
    "sample_documents": lambda s, v: s.sample_documents(v),
    "sample_documents(tenant=)": lambda s, v: s.sample_documents(1, tenant=v),
    "texts(namespace=)": lambda s, v: list(s.texts(namespace=v)),
    "note(tenant=)": lambda s, v: s.note(NAME, tenant=v),
    **{f"{name}(name)": (lambda s, v, n=name: getattr(s, n)(v, b"x")) for name in ("settle_note", "discard_note")},
    **{f"{name}(content)": (lambda s, v, n=name: getattr(s, n)(NAME, v)) for name in ("settle_note", "discard_note")},
    **{f"{name}(tenant=)": (lambda s, v, n=name: getattr(s, n)(NAME, b"x", tenant=v)) for name in ("settle_note", "discard_note")},
    "tenants([v])": lambda s, v: s.tenants([v]),
    **{f"prune({name}=)": (lambda s, v, n=name: s.prune(lambda head: True, **{n: v})) for name in ("foreign_too", "dry_run")},
    **{f"{method}({place})": read(method, place) for method in ("read", "locate", "has") for place in (0, 1)},
    "rows_there": read("rows_there", 0, 1),
    "read_speed": lambda s, v: s.read_speed(v),
    "ChunkKey": lambda s, v: ChunkKey(v),
    **{f"Namespace({name}=)": namespace(name) for name in ("model", "tokenizer", "dtype", "lead_ins", "tenant")},
    "Namespace(lead_ins=[v])": lambda s, v: replace(NAMESPACE, lead_ins=[v]).digest,
    "Namespace(lead_ins=[[v]])": lambda s, v: replace(NAMESPACE, lead_ins=[[v]]).digest,
    "make_key(namespace)": lambda s, v: make_key(v, [1]),
    "make_key(ids)": lambda s, v: make_key(NAMESPACE, v),
    "make_key([id])": lambda s, v: make_key(NAMESPACE, [v]),
    **{f"ChunkLayout({name}=)": layout(name) for name in ("tokens", "layers", "dtype", "codec")},
    "ChunkLayout(layers=(v,))": lambda s, v: ChunkLayout(1, (v,), "float32", "exact"),
    **{f"LayerSpec({name}=)": (lambda s, v, n=name: LayerSpec(**{"heads": 1, "head_dim": 1, "v_head_dim": 1, n: v})) for name in ("heads", "head_dim", "v_head_dim")},
    **{f"RowFormat({name}=)": (lambda s, v, n=name: RowFormat(**{"row_bytes": 1, n: v})) for name in ("row_bytes", "group_rows", "group_bytes")},
    "get_codec": lambda s, v: get_codec(v),
    "register_codec": lambda s, v: register_codec(v),
    "parse_bytes": lambda s, v: parse_bytes(v),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_no_argument_ends_in_a_foreign_error(store: ChunkStore, name: str) -> None:
    values = [*odd_values(), *hard_values(), torch.zeros(3), np.zeros(3), K.to(torch.complex64), K.to("meta")]
    if name == "prune":
        values = [value for value in values if not callable(value)]  # what a callback raises is the caller's
    assert foreign(lambda value: CALLS[name](store, value), values) == []
    reader = store.open(SAMPLE.key)
    if reader is None:
        assert name.startswith(("delete_", "set_document")), "what was meant may be among the values"
        return
    with reader:
        assert SAMPLE.matches(reader)


@pytest.mark.parametrize(
    "value",
    ["./kv\0", "", b"", 5, [], object(), 10**5000],
    ids=["relative-nul", "empty", "bytes", "int", "list", "object", "huge"],
)
def test_a_path_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(StoreError, match="store path"):
        ChunkStore(value)


REFUSED: dict[str, tuple[Call, list[Any]]] = {
    "flags": (made("pin_memory"), [0, 1, "no"]),
    "direct_io": (made("direct_io"), [0, 1, "no"]),
    "lasting": (lambda s, v: s.contains(SAMPLE.key, lasting=v), [0, None, "no"]),
    "budget": (made("host_budget"), [2**63, "9" * 40, "-1", -1, True, 1.5, "1 XB", float("nan")]),
    "ids": (lambda s, v: make_key(NAMESPACE, v), [["1"], [1.5], [True], [[1]], 3, "1", [2**63], np.array([2**63], np.uint64)]),
    "lead-ins": (namespace("lead_ins"), [[["1"]], [[1.5]], [[1 << 41]], ["ab"], [], 3]),
    "text": (called("put", "text"), [0, [], b"x", False]),
    "notes": (lambda s, v: s.settle_note(NAME, v), ["x", bytearray(b"x"), None, b"x" * ((1 << 20) + 1)]),
    "rows": (read("locate", 1), [-1, 10, 0.0, "1", None]),
    "layers": (read("locate", 0), [-1, 2, 0.0, "1", None]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_be_meant_is_not_taken_silently(store: ChunkStore, name: str) -> None:
    call, values = REFUSED[name]
    assert accepted(lambda value: call(store, value), values) == []


def test_arguments_that_numpy_makes_are_taken(store: ChunkStore) -> None:
    ids = np.array(SAMPLE.token_ids)
    assert make_key(NAMESPACE, ids) == make_key(NAMESPACE, ids.astype(np.uint16)) == SAMPLE.key
    assert parse_bytes(np.int64(5)) == 5
    with store.open(SAMPLE.key) or pytest.fail("it is there") as reader:
        assert torch.equal(reader.read(np.int64(0), np.int64(9)), reader.read(0, 9))


def test_a_refusal_is_a_store_error_and_a_value_error(store: ChunkStore) -> None:
    with pytest.raises(StoreArgumentError, match=r"document id is 3, a int; use a string"):
        store.set_document(3, [])  # type: ignore[arg-type]
    assert issubclass(StoreArgumentError, ValueError)


def test_all_public_names_are_there() -> None:
    assert [name for name in cachetune_store.__all__ if not hasattr(cachetune_store, name)] == []
    with pytest.raises(AttributeError, match="nothing_such"):
        cachetune_store.nothing_such  # noqa: B018
