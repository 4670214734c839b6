"""A place that machines share, with a key: what others forge, swap or move there is damage."""

from __future__ import annotations

import contextlib
import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shared_places import Place, eventually
from store_samples import sample

from cachetune_store import ChunkStore, StoreError, StoreKeyError
from cachetune_store.errors import RemoteError
from cachetune_store.remote import catalogue
from cachetune_store.remote.changes import Change, change_name, encode
from cachetune_store.seals import CHECKSUMS

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
NOTE = "a" * 64


def fill(store: ChunkStore, name: str, *seeds: int, tenant: str = "") -> None:
    for seed in seeds:
        sample(seed, tenant=tenant).put(store, text=f"text {seed}")
    store.set_document(name, [sample(seed, tenant=tenant).key for seed in seeds], tenant=tenant)
    store.sync()


def tier_of(store: ChunkStore, seed: int) -> str | None:
    reader = store.open(sample(seed).key)
    if reader is None:
        return None
    with reader:
        assert sample(seed).matches(reader)
        return str(reader.tier)


def synced(store: ChunkStore) -> None:
    """A change that can't be read is read again a few times before it is passed over."""
    for _ in range(4):
        with contextlib.suppress(StoreError):
            store.sync()


def content(place: Place, name: str) -> bytes:
    found = place.objects.get(name, 1 << 30)
    assert found is not None
    return found


def only(place: Place, prefix: str) -> str:
    (name,) = place.objects.names(prefix)
    return name


@pytest.mark.parametrize("codec", [None, "int8"])
def test_machines_with_the_key_share_what_they_have(place: Place, tmp_path: Path, codec: str | None) -> None:
    """Each folder and the place have root keys of their own: sums are made anew on the way."""
    first = place.store(tmp_path / "first", store_key=KEY, remote_codec=codec)
    first.settle_note(NOTE, b"agreed")
    fill(first, "d", 1, 2)
    second = place.store(tmp_path / "second", store_key=KEY)
    third = place.store(store_key=KEY)
    for other in (second, third):
        assert [info.id for info in other.documents()] == ["d"]
        assert other.note(NOTE) == b"agreed"
    if codec is None:
        assert tier_of(second, 1) == tier_of(third, 1) == "remote"
        eventually(lambda: second.tier("disk").contains(sample(1).key))  # closing drops what waits to be written there
        second.close()
        with ChunkStore(tmp_path / "second", store_key=KEY) as alone:
            assert tier_of(alone, 1) == "disk", "what was read whole is in the folder, with the folder's sums"
            assert alone.verify().ok
    assert third.verify().ok
    assert third.stats().remote.damaged == 0


def test_a_place_with_a_key_opens_with_that_key_only(folder: Place, tmp_path: Path) -> None:
    fill(folder.store(store_key=KEY), "d", 1)
    for options, said in (({}, "none is given"), ({"store_key": OTHER}, "another key")):
        for path in (None, tmp_path / said.replace(" ", "-")):
            with pytest.raises(StoreKeyError, match=said):
                folder.store(path, **options)
    assert tier_of(folder.store(store_key=KEY), 1) == "remote", "nothing was taken for damaged"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, ["without a key"]),
        ({"store_key": KEY}, ["not encrypted"]),
        ({"store_key": KEY, "encrypt": True}, []),
    ],
)
def test_a_new_place_says_once_what_is_not_protected(
    folder: Place, caplog: pytest.LogCaptureFixture, options: dict[str, Any], said: list[str]
) -> None:
    if "encrypt" in options:
        pytest.importorskip("cryptography")
    for _ in range(2):  # the second one opens what the first has made
        folder.store(**options).sync()
    warnings = [record.getMessage() for record in caplog.records if "new shared place" in record.getMessage()]
    assert len(warnings) == len(said)
    assert all(words in warning for words, warning in zip(said, warnings, strict=True))


def test_a_place_without_a_key_takes_none(folder: Place) -> None:
    fill(folder.store(), "d", 1)
    with pytest.raises(StoreKeyError, match="was made without a key"):
        folder.store(store_key=KEY)


def forged_chunk(place: Place, name: str) -> bytes:
    """The object of a chunk as someone writes it who lacks the key: the right numbers and checksums."""
    with ChunkStore(None) as store:
        sample(1).put(store)
    raw = bytearray(content(place, name))
    raw[-4096] ^= 1
    return bytes(raw)


def test_a_forged_object_is_deleted_and_counted(place: Place) -> None:
    first = place.store(store_key=KEY)
    fill(first, "d", 1)
    name = only(place, "chunks/")
    place.objects.put(name, [forged_chunk(place, name)])
    second = place.store(store_key=KEY)
    reader = second.open(sample(1).key)
    if reader is not None:
        with reader, pytest.raises(Exception, match="checksum"):
            sample(1).matches(reader)
        assert second.discard(sample(1).key)
    second.sync()
    assert second.stats().remote.damaged == 1
    assert not list(place.objects.names("chunks/"))


def test_objects_that_changed_places_are_damage(folder: Place) -> None:
    fill(folder.store(store_key=KEY), "d", 1, 2)
    one, two = sorted(folder.objects.names("chunks/"))
    first, second = content(folder, one), content(folder, two)
    folder.objects.put(one, [second])
    folder.objects.put(two, [first])
    store = folder.store(store_key=KEY)
    assert tier_of(store, 1) is None
    assert tier_of(store, 2) is None
    assert store.stats().remote.damaged == 2


def forge(raw: bytes, edit: Callable[[bytes], bytes]) -> bytes:
    """A change with other content, by someone who lacks the key: packed anew, behind the old sum."""
    return raw[:32] + gzip.compress(edit(gzip.decompress(raw[32:])), mtime=0)


@pytest.mark.parametrize("how", ["edited", "without a sum", "moved from another number", "of another place"])
def test_a_forged_change_is_passed_over(
    folder: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    first = folder.store(store_key=KEY)
    fill(first, "d", 1)
    fill(first, "e", 2)
    newest = max(folder.objects.names("changes/"))
    number = int(newest[-12:]) + 1
    removal = Change("nobody", [], [{"op": "del", "tenant": "", "id": "d"}])
    elsewhere = Place(f"file://{tmp_path / 'elsewhere'}", {})
    forgeries: dict[str, Callable[[], bytes]] = {
        "edited": lambda: forge(content(folder, newest), lambda plain: plain.replace(b'"e"', b'"d"')),
        "without a sum": lambda: encode(removal, change_name(number), CHECKSUMS),
        "moved from another number": lambda: content(folder, newest),
        "of another place": lambda: content(elsewhere, change_name(number)),
    }
    if how == "of another place":
        other = elsewhere.store(store_key=KEY)
        while max(elsewhere.objects.names("changes/"), default="") < change_name(number):
            fill(other, "d", 3)
        elsewhere.close()
    folder.objects.put(change_name(number), [forgeries[how]()])
    second = folder.store(store_key=KEY)
    synced(second)
    assert {info.id for info in second.documents()} == {"d", "e"}
    assert "it is passed over" in caplog.text
    fill(second, "f", 4)
    synced(first)
    assert {info.id for info in first.documents()} == {"d", "e", "f"}


def test_a_forged_snapshot_is_not_used(folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "SNAPSHOT_EVERY", 4)
    first = folder.store(store_key=KEY)
    for seed in range(6):
        fill(first, f"d{seed}", seed)
    snapshots = sorted(folder.objects.names("snapshots/"))
    assert len(snapshots) > 1
    folder.objects.put(snapshots[-1], [content(folder, snapshots[-2])])  # an older one in its place
    other = folder.store(store_key=KEY)
    assert {info.id for info in other.documents()} == {f"d{seed}" for seed in range(6)}


def test_an_older_state_of_the_whole_log_is_not_told_from_the_newest(folder: Place) -> None:
    """By a machine that has never seen the newer one. SECURITY.md says so; a machine that has seen it keeps what it knows."""
    first = folder.store(store_key=KEY)
    fill(first, "d", 1)
    known = set(folder.objects.names("changes/"))
    fill(first, "e", 2)
    folder.objects.delete(set(folder.objects.names("changes/")) - known)
    assert [info.id for info in folder.store(store_key=KEY).documents()] == ["d"]
    first.sync()
    assert {info.id for info in first.documents()} == {"d", "e"}


def test_a_forged_note_is_damaged(folder: Place) -> None:
    first = folder.store(store_key=KEY)
    first.settle_note(NOTE, b"ours")
    name = only(folder, "notes/")
    folder.objects.put(name, [content(folder, name).replace(b"ours", b"evil")])
    second = folder.store(store_key=KEY)
    assert second.note(NOTE) == b""
    assert second.discard_note(NOTE, b"")
    assert second.settle_note(NOTE, b"anew") == b"anew"


def test_the_place_is_given_another_key_with_the_folder(folder: Place, tmp_path: Path) -> None:
    first = folder.store(tmp_path / "first", store_key=KEY)
    fill(first, "d", 1)
    second = folder.store(tmp_path / "second", store_key=KEY)
    first.change_key(OTHER)
    fill(second, "e", 2)  # it is open
    second.close()
    with pytest.raises(StoreKeyError, match="another key"):
        folder.store(store_key=KEY)
    with ChunkStore(tmp_path / "second", store_key=KEY) as alone:
        alone.change_key(OTHER)
    for path in (tmp_path / "second", None):
        assert {info.id for info in folder.store(path, store_key=OTHER).documents()} == {"d", "e"}


def test_a_place_that_has_another_key_by_now_is_only_unreadable(
    folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chunks are computed, and none is taken for damaged, or deleted."""
    fill(folder.store(store_key=KEY), "d", 1)
    folder.store(tmp_path / "kv", store_key=KEY).close()  # it knows the chunk from then on
    objects = folder.objects
    described = json.loads(content(folder, "store.json"))

    def unreachable(*_: object) -> None:
        raise RemoteError("it doesn't answer")

    with monkeypatch.context() as patch:
        patch.setattr(type(objects), "get", unreachable)
        store = folder.store(tmp_path / "kv", store_key=KEY)
    changed = described | {"key": described["key"] | {"check": "00" * 32}}
    objects.put("store.json", [json.dumps(changed).encode()])
    errors: list[StoreError] = []
    deadline = time.monotonic() + 20
    while not any(isinstance(error, StoreKeyError) for error in errors):  # at first, the place is left alone
        assert store.open(sample(1).key, errors=errors) is None
        assert time.monotonic() < deadline
    assert store.stats().damaged == 0
    assert len(list(objects.names("chunks/"))) == 1


def test_machines_go_on_after_the_place_was_given_another_key(folder: Place, tmp_path: Path) -> None:
    """Also when they look whether it is still the same place, which they do every few minutes."""
    first = folder.store(tmp_path / "first", store_key=KEY)
    fill(first, "d", 1)
    others = [folder.store(tmp_path / "second", store_key=KEY), folder.store(store_key=KEY)]
    first.change_key(OTHER)
    for number, other in enumerate(others):
        other.tier("remote").catalogue.catch_up(look_far=True)
        other.rebuild_index() if other.path else None
        fill(other, f"e{number}", 2 + number)
        assert tier_of(other, 1) is not None
    first.delete_document("d")
    first.sync()
    for other in others:
        other.sync()
        assert [info.id for info in other.documents()] == ["e0", "e1"]


def test_a_place_whose_description_is_gone_is_no_new_store(folder: Place, tmp_path: Path) -> None:
    fill(folder.store(store_key=KEY), "d", 1)
    described = content(folder, "store.json")
    folder.objects.delete(["store.json"])
    for path in (None, tmp_path / "kv"):
        with pytest.raises(StoreKeyError, match=r"store.json is gone.*Put the object back"):
            folder.store(path, store_key=KEY)
    assert folder.objects.get("store.json", 9999) is None
    folder.objects.put("store.json", [described])
    assert tier_of(folder.store(store_key=KEY), 1) == "remote"


def test_a_place_that_was_emptied_is_a_new_store(folder: Place) -> None:
    fill(folder.store(store_key=KEY), "d", 1)
    folder.objects.delete([name for prefix in ("", "chunks/") for name in list(folder.objects.names(prefix))])
    fill(folder.store(store_key=KEY), "e", 2)
    assert [info.id for info in folder.store(store_key=KEY).documents()] == ["e"]


def test_a_forged_note_takes_no_machines_good_copy(folder: Place, tmp_path: Path) -> None:
    first = folder.store(tmp_path / "kv", store_key=KEY)
    first.settle_note(NOTE, b"ours")
    first.close()
    name = only(folder, "notes/")
    folder.objects.put(name, [content(folder, name).replace(b"ours", b"evil")])
    assert folder.store(tmp_path / "kv", store_key=KEY).note(NOTE) == b"ours"
    assert folder.store(store_key=KEY).note(NOTE) == b"ours", "it was put back"

    (local,) = (tmp_path / "kv" / "notes").rglob("*.json")
    local.write_bytes(b"evil" * 20)
    folder.objects.delete([name])
    assert folder.store(tmp_path / "kv", store_key=KEY).note(NOTE) == b""
    assert not list(folder.objects.names("notes/")), "what was forged here is told to nobody"

    folder.objects.put(name, [b"evil" * 20])
    assert folder.store(store_key=KEY).settle_note(NOTE, b"anew") == b"anew"
    assert folder.store(store_key=KEY).note(NOTE) == b"anew"
