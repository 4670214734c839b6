"""Keys: everything that changes the numbers changes the key."""

from __future__ import annotations

import dataclasses

import pytest

from cachetune_store import ChunkKey, Namespace, make_key
from cachetune_store.units import parse_bytes

NS = Namespace("model", "tokenizer", "float32", ((1, 2), (3, 4, 5)), "tenant")


def test_a_key_never_changes_between_releases_of_one_format() -> None:
    ns = Namespace("m", "t", "bfloat16", ((1,),), "")
    assert str(make_key(ns, [1, 2, 3])) == "1de50365ed20593c51435e40cf636ae104f68e5a272d6303e9852632507f7565"


@pytest.mark.parametrize(
    "change",
    [
        {"model": "model2"},
        {"tokenizer": "tokenizer2"},
        {"dtype": "float16"},
        {"lead_ins": ((1, 2),)},
        {"lead_ins": ((1, 2), (3, 4, 6))},
        {"lead_ins": ((1, 2), (3, 4))},
        {"lead_ins": ((3, 4, 5), (1, 2))},
        {"lead_ins": ((1, 2, 3), (4, 5))},
        {"lead_ins": ((1, 2, 3, 4, 5),)},
        {"lead_ins": ((1, 2), (3, 4, 5), ())},
        {"lead_ins": ((),)},
        {"tenant": ""},
        {"tenant": "tenant2"},
    ],
)
def test_every_field_of_the_namespace_is_in_the_key(change: dict[str, object]) -> None:
    other = dataclasses.replace(NS, **change)
    assert make_key(other, [5, 6]) != make_key(NS, [5, 6])
    assert other.digest != NS.digest


def test_fields_do_not_run_into_each_other() -> None:
    assert make_key(dataclasses.replace(NS, model="ab", tokenizer="c"), [1]) != make_key(
        dataclasses.replace(NS, model="a", tokenizer="bc"), [1]
    )
    assert make_key(dataclasses.replace(NS, lead_ins=((1, 2),)), [3]) != make_key(
        dataclasses.replace(NS, lead_ins=((1,),)), [2, 3]
    )
    assert make_key(dataclasses.replace(NS, lead_ins=((1,), (2,))), [3]) != make_key(
        dataclasses.replace(NS, lead_ins=((1,),)), [2, 3]
    )
    assert make_key(NS, [1, 2]) != make_key(NS, [2, 1])


def test_a_tenant_name_may_be_any_string() -> None:
    names = ["", "../..", "a/b", "ü", "\ud800", "\0", "a" * 10000]
    assert len({make_key(dataclasses.replace(NS, tenant=name), [1]) for name in names}) == len(names)


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n", "g" * 64])
def test_only_a_digest_can_be_a_key(digest: str) -> None:
    with pytest.raises(ValueError, match="64 lower-case hex"):
        ChunkKey(digest)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="float32, bfloat16, float16"):
        Namespace("m", "t", "float8", ((),))


@pytest.mark.parametrize("lead_ins", [(), (1, 2), 5, None, "ab", (("a",),)])
def test_lead_ins_are_lists_of_token_ids(lead_ins: object) -> None:
    with pytest.raises(ValueError, match="lead_ins is"):
        Namespace("m", "t", "float32", lead_ins)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "count"),
    [(0, 0), (5, 5), ("7", 7), ("4GiB", 4 << 30), ("1.5 KiB", 1536), ("2 mb", 2_000_000), ("3B", 3)],
)
def test_byte_counts(text: int | str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "4 parsecs", -1, True, None, 1.5])
def test_what_is_no_byte_count_is_refused_by_name(text: object) -> None:
    with pytest.raises(ValueError, match="disk_budget is"):
        parse_bytes(text, "disk_budget")  # type: ignore[arg-type]
