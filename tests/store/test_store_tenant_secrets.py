"""The secrets of an encrypted store's tenants: a deleted tenant can't be read any more, by anybody and from no copy."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from shared_places import Place, eventually
from store_samples import Sample, sample

from cachetune_store import ChunkStore, StoreArgumentError, StoreError, StoreKeyError
from cachetune_store.errors import RemoteError
from cachetune_store.notes import Notes
from cachetune_store.remote import catalogue, taking
from cachetune_store.remote.folder import Folder
from cachetune_store.removals import changes_so_far

pytest.importorskip("cryptography")

KEY = bytes(range(32))
TEXT = "The lighthouse was built in 1871 by three brothers."
NOTE = "c" * 64
ACME, OTHER = "acme", "other"


def encrypted(path: Path | None, **options: Any) -> ChunkStore:
    return ChunkStore(path, **{"store_key": KEY, "encrypt": True, "host_budget": 0} | options)


def one_of(tenant: str, seed: int = 1) -> Sample:
    return sample(seed, tenant=tenant)


def fill(store: ChunkStore, *tenants: str, seed: int = 1) -> None:
    for tenant in tenants:
        one_of(tenant, seed).put(store, text=TEXT)
        store.set_document(f"d{seed}", [one_of(tenant, seed).key], tenant=tenant)
        store.settle_note(NOTE, TEXT.encode(), tenant=tenant)


def reads(store: ChunkStore, tenant: str, seed: int = 1) -> bool:
    reader = store.open(one_of(tenant, seed).key)
    if reader is None:
        return False
    with reader:
        assert one_of(tenant, seed).matches(reader)
        return True


def texts(store: ChunkStore) -> int:
    found = list(store.texts())
    assert all(text == TEXT for _, text, _ in found)
    return len(found)


def copied(path: Path, to: Path) -> Path:
    return Path(shutil.copytree(path, to))


def kept_in(path: Path) -> set[bytes]:
    """What the files of secrets hold: each is written with other random bytes."""
    return {file.read_bytes() for file in (path / "secrets").rglob("*") if file.is_file() and file.name != "lock"}


def put_back(copy: Path, path: Path, *names: str) -> None:
    """What a backup has of these parts, beside what is there now."""
    for name in names:
        shutil.copytree(copy / name, path / name, dirs_exist_ok=True)


def test_a_deleted_tenant_is_gone_and_the_others_stay(tmp_path: Path) -> None:
    with encrypted(tmp_path) as store:
        fill(store, ACME, OTHER)
        assert texts(store) == 2
        assert store.delete_tenant(ACME)
        assert not reads(store, ACME)
        assert reads(store, OTHER)
        assert texts(store) == 1
        assert store.documents(tenant=ACME) == []
        assert store.note(NOTE, tenant=ACME) is None
    with encrypted(tmp_path) as store:
        assert not reads(store, ACME)
        assert reads(store, OTHER)
        fill(store, ACME)  # it may come again, with a secret of its own
        assert reads(store, ACME)
        assert store.verify().ok
    with encrypted(tmp_path) as store:
        assert reads(store, ACME)


def test_no_old_copy_of_a_deleted_tenant_can_be_read(tmp_path: Path) -> None:
    """Chunks, texts, notes and the secret itself, put back one after the other."""
    path = tmp_path / "kv"
    with encrypted(path) as store:
        fill(store, ACME, OTHER)
    copy = copied(path, tmp_path / "copy")
    with encrypted(path) as store:
        store.delete_tenant(ACME)
        put_back(copy, path, "chunks", "notes")
        assert not reads(store, ACME), "by the process that has deleted it"
        assert not store.tier("disk").path_of(one_of(ACME).key).exists()  # type: ignore[attr-defined]
        assert not store.note(NOTE, tenant=ACME)
    put_back(copy, path, "chunks", "notes", "documents", "index")
    with encrypted(path) as store:
        assert texts(store) == 1
        assert not reads(store, ACME)
        assert reads(store, OTHER)
    put_back(copy, path, "chunks", "notes", "documents", "index", "secrets")
    with encrypted(path) as store:
        assert texts(store) == 1
        assert not reads(store, ACME)
        assert reads(store, OTHER)
        assert not store.note(NOTE, tenant=ACME)
        assert store.stats().damaged == 0
    assert len(kept_in(copy)) == 2
    assert len(kept_in(copy) & kept_in(path)) == 1, "the copy of the secret was deleted again"


def test_a_running_process_drops_a_tenant_that_another_one_deletes(tmp_path: Path) -> None:
    with encrypted(tmp_path, host_budget="1GiB") as running, encrypted(tmp_path) as other:
        fill(running, ACME, OTHER)
        copy = copied(tmp_path / "chunks", tmp_path.with_name(f"{tmp_path.name}-copy"))
        assert running.touch_host(one_of(ACME).key)
        other.delete_tenant(OTHER)
        assert not reads(running, OTHER)
        mark = tmp_path / "secrets" / "erasures"
        seen = mark.stat().st_mtime_ns
        other.delete_tenant(ACME)
        os.utime(mark, ns=(seen, seen))  # somebody sets the time back
        shutil.copytree(copy, tmp_path / "chunks", dirs_exist_ok=True)
        assert running.open_in_memory(one_of(ACME).key) is None
        assert not running.touch_host(one_of(ACME).key)
        assert not reads(running, ACME)
        fill(running, OTHER)
        assert reads(running, OTHER)


@pytest.mark.parametrize("harm", ["damaged", "away"])
def test_a_secret_that_cannot_be_read_when_its_tenant_is_deleted_never_comes_back(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "kv"
    with encrypted(path) as store:
        fill(store, ACME)
        store.renew_secret(tenant=ACME)
        fill(store, ACME, seed=2)
    copy = copied(path, tmp_path / "copy")
    for file in (path / "secrets").rglob("*.json"):
        if harm == "damaged":
            content = file.read_bytes()
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        else:
            file.unlink()
    with encrypted(path) as store:
        store.delete_tenant(ACME)
        if harm == "damaged":
            damaged = [file.read_bytes()[:-1] for file in (copy / "secrets").rglob("*.json")]
            left = [file.read_bytes()[:-1] for file in (path / "secrets").rglob("*.json")]
            assert not any(each in left for each in damaged)
    put_back(copy, path, "secrets", "chunks")
    with encrypted(path) as store:
        assert not reads(store, ACME)
        assert not reads(store, ACME, 2)
        fill(store, ACME)
        assert reads(store, ACME)
    assert not kept_in(copy) & kept_in(path)


def test_deleting_can_be_cut_off_and_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with encrypted(tmp_path) as store:
        fill(store, ACME)
        store.renew_secret(tenant=ACME)
        fill(store, ACME, seed=2)
        secrets = kept_in(tmp_path)

        def refused(*_: object) -> None:
            raise OSError("the machine loses its power here")

        with monkeypatch.context() as patched:
            patched.setattr(Notes, "replace", refused)
            with pytest.raises(StoreError):
                store.delete_tenant(ACME)
    with encrypted(tmp_path) as store:
        assert not reads(store, ACME)
        assert not reads(store, ACME, 2)
        store.delete_tenant(ACME)
        assert len(secrets) == 2
        assert not secrets & kept_in(tmp_path)
        assert not list((tmp_path / "chunks").rglob("*.safetensors"))


def test_a_secret_that_is_renewed_meanwhile_saves_no_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with encrypted(tmp_path) as store, encrypted(tmp_path) as other:
        fill(store, ACME)
        before = kept_in(tmp_path)
        write = Notes.write_first

        def meanwhile(notes: Notes, tenant: str, name: str, content: bytes) -> bytes:
            if content == b"erased":
                monkeypatch.undo()
                other.renew_secret(tenant=ACME)
            return write(notes, tenant, name, content)

        monkeypatch.setattr(Notes, "write_first", meanwhile)
        store.delete_tenant(ACME)
        assert not before & kept_in(tmp_path)
        fill(store, ACME, seed=2)
        assert reads(store, ACME, 2)


def test_a_renewed_secret_is_for_new_files_and_old_ones_stay_readable(tmp_path: Path) -> None:
    with encrypted(tmp_path) as store:
        fill(store, ACME)
        store.renew_secret(tenant=ACME)
        fill(store, ACME, seed=2)
        before = copied(tmp_path, tmp_path.with_name(f"{tmp_path.name}-before"))
    with encrypted(tmp_path) as store:
        assert reads(store, ACME)
        assert reads(store, ACME, 2)
        assert texts(store) == 2
        store.delete_tenant(ACME)
    put_back(before, tmp_path, "chunks", "secrets")
    with encrypted(tmp_path) as store:
        assert not reads(store, ACME)
        assert not reads(store, ACME, 2)
    with (
        ChunkStore(tmp_path.with_name(f"{tmp_path.name}-keyed"), store_key=KEY) as store,
        pytest.raises(StoreArgumentError, match="is not encrypted, so its tenants have no secrets"),
    ):
        store.renew_secret(tenant=ACME)


def test_secrets_that_changed_places_open_nothing(tmp_path: Path) -> None:
    with encrypted(tmp_path) as store:
        fill(store, ACME, OTHER)
    first, second = (tmp_path / "secrets").rglob("*.json")
    ours, theirs = first.read_bytes(), second.read_bytes()
    first.write_bytes(theirs)
    second.write_bytes(ours)
    with encrypted(tmp_path) as store:
        assert not reads(store, ACME)
        assert not reads(store, OTHER)
        assert texts(store) == 0
        fill(store, ACME, OTHER)
        assert reads(store, ACME)
        assert reads(store, OTHER)


def test_a_file_opens_with_its_own_tenants_secret_only(tmp_path: Path) -> None:
    with encrypted(tmp_path) as store:
        fill(store, ACME, OTHER)
        keyring = store.seal.keyring  # type: ignore[attr-defined]
        _, theirs = keyring.current(OTHER)
        keyring._known = {ACME: [(keyring.current(ACME)[0], theirs)]}  # noqa: SLF001
        assert not reads(store, ACME)
        assert store.stats().damaged == 1


def test_secrets_are_in_no_file(tmp_path: Path) -> None:
    with encrypted(tmp_path) as store:
        fill(store, ACME)
        identity, secret = store.seal.keyring.current(ACME)  # type: ignore[attr-defined]
        for path in tmp_path.rglob("*"):
            content = path.read_bytes() if path.is_file() else b""
            assert not any(each in content for each in (secret, secret.hex().encode(), identity.encode())), path


# -- a place that machines share -----------------------------------------------------------------------------------


def secrets_in(place: Place) -> set[bytes]:
    return {place.objects.get(name, 1 << 20) or b"" for name in place.objects.names("secrets/")}


def test_all_secrets_of_a_deleted_tenant_go_on_every_machine(folder: Place, tmp_path: Path) -> None:
    first = folder.store(tmp_path / "first", store_key=KEY, encrypt=True)
    for seed in (1, 2, 3):
        fill(first, ACME, seed=seed)
        first.renew_secret(tenant=ACME)
    first.sync()
    second = folder.store(tmp_path / "second", store_key=KEY)
    assert all(reads(second, ACME, seed) for seed in (1, 2, 3))
    before = kept_in(tmp_path / "second")
    assert len(before) >= 3
    first.delete_tenant(ACME)
    first.sync()
    second.sync()
    assert not before & kept_in(tmp_path / "second")
    assert not any(reads(second, ACME, seed) for seed in (1, 2, 3))


def test_a_place_that_cannot_be_asked_once_keeps_no_secret(
    folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that another machine has drawn is only there."""
    first = folder.store(tmp_path / "first", store_key=KEY, encrypt=True)
    fill(first, ACME)
    first.sync()
    second = folder.store(tmp_path / "second", store_key=KEY)
    older = set(folder.objects.names("secrets/"))
    second.renew_secret(tenant=ACME)
    before = secrets_in(folder)
    (newer,) = set(folder.objects.names("secrets/")) - older
    get = Folder.get
    failed: list[str] = []

    def once(place: Folder, name: str, limit: int) -> bytes | None:
        if name == newer and not failed:
            failed.append(name)
            raise RemoteError("the connection was reset")
        return get(place, name, limit)

    monkeypatch.setattr(Folder, "get", once)
    with pytest.raises(RemoteError, match="was reset"):
        first.delete_tenant(ACME)
    first.tier("remote").breaker.worked()  # type: ignore[attr-defined]
    first.delete_tenant(ACME)
    assert not before & secrets_in(folder)


def test_a_damaged_copy_of_a_secret_harms_no_other_machine(folder: Place, tmp_path: Path) -> None:
    first = folder.store(tmp_path / "first", store_key=KEY, encrypt=True)
    fill(first, ACME)
    first.sync()
    second = folder.store(tmp_path / "second", store_key=KEY)
    assert reads(second, ACME)
    in_place = secrets_in(folder)
    (file,) = (tmp_path / "second" / "secrets").rglob("*.json")
    file.write_bytes(b"junk")
    second.renew_secret(tenant=ACME)
    assert in_place < secrets_in(folder)
    assert reads(second, ACME), "the good copy has taken its place"
    assert reads(folder.store(tmp_path / "third", store_key=KEY), ACME)


def test_a_damaged_secret_stays_for_whoever_can_mend_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with encrypted(tmp_path) as store:
        fill(store, ACME)
    copy = copied(tmp_path, tmp_path.with_name(f"{tmp_path.name}-copy"))
    (file,) = (tmp_path / "secrets").rglob("*.json")
    file.write_bytes(b"junk")
    with encrypted(tmp_path) as store:
        assert not reads(store, ACME)
        assert "put its file back from a backup" in caplog.text
        fill(store, ACME, seed=2)
        assert reads(store, ACME, 2)
    assert file.read_bytes() == b"junk"
    put_back(copy, tmp_path, "secrets", "chunks")
    with encrypted(tmp_path) as store:
        assert reads(store, ACME)
        assert reads(store, ACME, 2)


@pytest.mark.parametrize("options", [{}, {"store_key": KEY, "encrypt": True}], ids=["plain", "encrypted"])
def test_notes_of_a_deleted_tenant_go_on_every_machine(folder: Place, tmp_path: Path, options: dict[str, Any]) -> None:
    first = folder.store(tmp_path / "first", **options)
    fill(first, ACME)
    first.sync()
    away = folder.store(tmp_path / "away", **options)
    assert away.note(NOTE, tenant=ACME)
    away.close()
    second = folder.store(tmp_path / "second", **options)
    assert second.note(NOTE, tenant=ACME)
    before = changes_so_far()
    first.delete_tenant(ACME)
    first.sync()
    second.sync()
    assert second.note(NOTE, tenant=ACME) is None, "not damaged, which would be written again"
    assert second.removed_since(before, tenant=ACME), "what requests have of it is not stored"
    assert not list((tmp_path / "second" / "notes").rglob("*.json"))
    assert folder.store(tmp_path / "away", **options).note(NOTE, tenant=ACME) is None
    assert folder.store(tmp_path / "third", **options).note(NOTE, tenant=ACME) is None


def test_a_tenant_that_is_deleted_without_the_place_is_told_later(folder: Place, tmp_path: Path) -> None:
    first = folder.store(tmp_path / "first", store_key=KEY, encrypt=True)
    fill(first, ACME)
    first.sync()
    second = folder.store(tmp_path / "second", store_key=KEY)
    assert reads(second, ACME)
    first.close()
    with ChunkStore(tmp_path / "first", store_key=KEY) as alone:
        alone.delete_tenant(ACME)
    folder.store(tmp_path / "first", store_key=KEY).sync()
    second.sync()
    assert not reads(second, ACME)


def test_a_place_that_is_emptied_is_not_made_anew_without_encryption(folder: Place) -> None:
    store = folder.store(store_key=KEY, encrypt=True)
    fill(store, ACME)
    running = folder.store(store_key=KEY)
    assert reads(running, ACME)
    objects = folder.objects
    for prefix in ("changes/", "chunks/", "notes/", "secrets/", "snapshots/"):
        objects.delete(list(objects.names(prefix)))
    objects.delete(["store.json"])
    running.tier("remote").catalogue.catch_up(look_far=True)  # type: ignore[attr-defined]
    assert b'"version": 3' in (objects.get("store.json", 1 << 16) or b"")


def test_a_place_that_is_down_is_no_error_where_a_secret_comes_back(network: Place, tmp_path: Path) -> None:
    network.timeout = 2.0
    first = network.store(tmp_path / "first", store_key=KEY, encrypt=True)
    fill(first, ACME)
    first.sync()
    copy = copied(tmp_path / "first", tmp_path / "copy")
    first.delete_tenant(ACME)
    first.close()
    put_back(copy, tmp_path / "first", "secrets", "chunks", "index")
    assert network.proxy is not None
    network.proxy.fault = "refuse"
    with network.store(tmp_path / "first", store_key=KEY) as store:
        assert not reads(store, ACME)
        assert texts(store) == 0


def test_a_deleted_tenant_is_gone_on_every_machine(place: Place, tmp_path: Path) -> None:
    first = place.store(tmp_path / "first", store_key=KEY, encrypt=True)
    fill(first, ACME, OTHER)
    first.sync()
    second = place.store(tmp_path / "second", store_key=KEY, host_budget="1GiB")
    third = place.store(store_key=KEY)
    for other in (second, third):
        assert reads(other, ACME)
        assert texts(other) == 2
        assert other.note(NOTE, tenant=ACME) == TEXT.encode()
    away = place.store(tmp_path / "away", store_key=KEY, encrypt=True)
    assert reads(away, ACME)
    away.close()
    in_place, in_folders = secrets_in(place), kept_in(tmp_path / "second") | kept_in(tmp_path / "away")
    assert len(in_place) == 2
    copies = {name: place.objects.get(name, 1 << 30) or b"" for name in place.objects.names("chunks/")}
    first.delete_tenant(ACME)
    first.sync()
    for name, content in copies.items():
        place.objects.put(name, [content])
    for other in (second, third):
        other.sync()
        assert not reads(other, ACME)
        assert other.open_in_memory(one_of(ACME).key) is None
        assert reads(other, OTHER)
        assert texts(other) == 1
    # A machine that wasn't there: its folder has the secret, and the chunk.
    away = place.store(tmp_path / "away", store_key=KEY)
    assert not reads(away, ACME)
    assert reads(away, OTHER)
    assert len(in_place & secrets_in(place)) == 1, "that of the other tenant"
    for name in ("first", "second", "away"):
        assert len(in_folders & kept_in(tmp_path / name)) <= 1
    fill(second, ACME, seed=2)
    second.sync()
    away.sync()
    assert reads(away, ACME, 2)


def test_a_folder_never_puts_an_erased_secret_back(
    folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cachetune_store.remote.bucket import Bucket

    first = folder.store(tmp_path / "first", store_key=KEY, encrypt=True)
    fill(first, ACME)
    first.sync()
    away = folder.store(tmp_path / "away", store_key=KEY)
    assert reads(away, ACME)
    away.close()
    first.delete_tenant(ACME)
    first.sync()
    written: list[str] = []
    put = Bucket.put

    def noted(bucket: Bucket, name: str, *arguments: Any, **options: Any) -> bool:
        written.append(name)
        return put(bucket, name, *arguments, **options)

    monkeypatch.setattr(Bucket, "put", noted)
    monkeypatch.setattr(taking.Taking, "foreign", lambda *_: None)  # the log doesn't say it in time
    away = folder.store(tmp_path / "away", store_key=KEY)
    assert not reads(away, ACME)
    assert not [name for name in written if name.startswith("secrets/")]


def test_a_secret_that_cannot_be_had_now_is_no_damage(network: Place, tmp_path: Path) -> None:
    network.timeout = 2.0
    first = network.store(tmp_path / "first", store_key=KEY, encrypt=True)
    fill(first, ACME)
    first.sync()
    second = network.store(tmp_path / "second", store_key=KEY)
    assert reads(second, ACME)
    eventually(lambda: second.tier("disk").contains(one_of(ACME).key))  # closing drops what waits to be written there
    second.close()
    shutil.rmtree(tmp_path / "second" / "secrets")
    assert network.proxy is not None
    network.proxy.fault = "refuse"
    second = network.store(tmp_path / "second", store_key=KEY)
    errors: list[StoreError] = []
    assert second.open(one_of(ACME).key, errors=errors) is None
    assert any(isinstance(each, StoreKeyError) for each in errors)
    assert second.stats().damaged == 0
    assert list((tmp_path / "second" / "chunks").rglob("*.safetensors"))


def asked_for_secrets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From now on, the thread of each request for a secret or for what says that one was erased."""
    asked: list[str] = []
    real = Folder.get

    def get(place: Folder, name: str, limit: int) -> bytes | None:
        if name.startswith("secrets/"):
            asked.append(threading.current_thread().name)
        return real(place, name, limit)

    monkeypatch.setattr(Folder, "get", get)
    return asked


def test_how_often_a_tenant_was_deleted_is_asked_for_together(
    folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = folder.store(tmp_path / "first", store_key=KEY, encrypt=True)
    fill(first, ACME)
    first.sync()
    for _ in range(20):
        first.delete_tenant(ACME)
    fill(first, ACME, seed=2)
    first.sync()
    second = folder.store(store_key=KEY, host_budget=0)
    asked = asked_for_secrets(monkeypatch)
    assert reads(second, ACME, 2)
    assert len(asked) > 20
    assert asked.count(threading.current_thread().name) < 8


def test_a_deletion_costs_machines_no_request_for_each_other_tenant(
    folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenants = [f"t{number}" for number in range(12)]
    first = folder.store(tmp_path / "first", store_key=KEY, encrypt=True)
    second = folder.store(store_key=KEY, host_budget=0)
    fill(first, *tenants)
    first.sync()
    second.sync()
    assert all(reads(second, tenant) for tenant in tenants)
    first.delete_tenant(tenants[0])
    first.sync()
    second.sync()
    asked = asked_for_secrets(monkeypatch)
    assert all(reads(second, tenant) for tenant in tenants[1:])
    assert asked == []
    assert not reads(second, tenants[0])


def test_what_was_erased_stands_in_snapshots(folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a machine that comes back when the changes are deleted, and doesn't reach the place the next time."""
    monkeypatch.setattr(catalogue, "SNAPSHOT_EVERY", 2)
    first = folder.store(tmp_path / "first", store_key=KEY, encrypt=True)
    fill(first, ACME)
    first.sync()
    away = folder.store(tmp_path / "away", store_key=KEY, encrypt=True)
    assert reads(away, ACME)
    away.close()
    copy = copied(tmp_path / "away", tmp_path / "copy")
    first.delete_tenant(ACME)
    for seed in (2, 3, 4):
        fill(first, OTHER, seed=seed)
        first.sync()
    assert not any(name.endswith("01") for name in folder.objects.names("changes/"))
    folder.store(tmp_path / "away", store_key=KEY).close()
    put_back(copy, tmp_path / "away", "chunks", "secrets")
    with ChunkStore(tmp_path / "away", store_key=KEY, host_budget=0) as alone:
        assert not reads(alone, ACME)
