"""Profiles: saved whole, found again by everything they depend on, and never trusted when damaged."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from cachetune_rag.measuring.profiles import MAX_BYTES, Profiles
from cachetune_store import ChunkStore, StoreError

KEY = {"namespace": "a" * 64, "selector": "probe", "codec": "exact"}
CONTENT = {"ratio": 0.15, "figures": [{"ratio": 0.0, "kl": 1.25}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with ChunkStore(tmp_path / "kv"):
        return tmp_path / "kv"


def only_file(folder: Path) -> Path:
    (file,) = (folder / "profiles").iterdir()
    return file


def test_what_was_saved_is_found_by_a_later_object_and_by_no_other_key(folder: Path) -> None:
    path = Profiles(folder).save("calibration", KEY, CONTENT)
    assert path == only_file(folder)
    later = Profiles(folder)
    assert later.load("calibration", dict(reversed(KEY.items()))) == CONTENT
    for name in KEY:
        assert later.load("calibration", {**KEY, name: "other"}) is None
    assert later.load("tuning", KEY) is None


def test_saving_again_replaces_and_leaves_no_other_file(folder: Path) -> None:
    profiles = Profiles(folder)
    profiles.save("calibration", KEY, CONTENT)
    profiles.save("calibration", KEY, {"ratio": 0.3})
    assert profiles.load("calibration", KEY) == Profiles(folder).load("calibration", KEY) == {"ratio": 0.3}
    assert only_file(folder).stat().st_mode & 0o777 == 0o600
    assert list((folder / "tmp").glob("*.tmp")) == []


def test_in_memory_nothing_is_written_and_a_caller_gets_a_copy() -> None:
    profiles = Profiles(None)
    assert profiles.save("calibration", KEY, CONTENT) is None
    loaded = profiles.load("calibration", KEY)
    assert loaded == CONTENT
    loaded["ratio"] = 1.0
    assert profiles.load("calibration", KEY) == CONTENT
    assert Profiles(None).load("calibration", KEY) is None


def test_what_was_found_missing_stays_so_until_this_object_saves_it(folder: Path) -> None:
    running = Profiles(folder)
    assert running.load("calibration", KEY) is None
    Profiles(folder).save("calibration", KEY, CONTENT)
    assert running.load("calibration", KEY) is None
    running.save("calibration", KEY, {"ratio": 0.5})
    assert running.load("calibration", KEY) == {"ratio": 0.5}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace("cachetune-profile", "other"),
        lambda text: text.replace('"probe"', '"frequency"'),
        lambda text: text.replace("0.15", "NaN"),
        lambda text: text + " " * MAX_BYTES,
        lambda text: "[" * 100_000,
        lambda text: text.replace('"probe"', '"\udc80"'),
    ],
)
def test_a_damaged_file_counts_as_missing_and_is_logged(folder: Path, damage, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    Profiles(folder).save("calibration", KEY, CONTENT)
    file = only_file(folder)
    file.write_bytes(damage(file.read_text()).encode("utf-8", "surrogateescape"))
    with caplog.at_level(logging.WARNING):
        assert Profiles(folder).load("calibration", KEY) is None
    assert str(file) in caplog.text
    Profiles(folder).save("calibration", KEY, CONTENT)
    assert Profiles(folder).load("calibration", KEY) == CONTENT


def test_a_link_and_a_pipe_are_not_read(folder: Path, tmp_path: Path) -> None:
    Profiles(folder).save("calibration", KEY, CONTENT)
    file = only_file(folder)
    elsewhere = tmp_path / "elsewhere.json"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert Profiles(folder).load("calibration", KEY) is None
    file.unlink()
    os.mkfifo(file)
    assert Profiles(folder).load("calibration", KEY) is None


def test_refused_before_anything_is_written(folder: Path) -> None:
    profiles = Profiles(folder)
    for kind, key, content in [
        ("../x", KEY, CONTENT),
        ("calibration", {"layers": 3}, CONTENT),
        ("calibration", KEY, {"kl": float("nan")}),
        ("calibration", KEY, {"text": "x" * MAX_BYTES}),
    ]:
        with pytest.raises(ValueError):  # noqa: PT011
            profiles.save(kind, key, content)  # type: ignore[arg-type]
    assert not (folder / "profiles").exists()


def test_a_store_that_cannot_be_written_is_an_error_and_the_result_still_counts(folder: Path) -> None:
    (folder / "profiles").write_text("in the way")
    profiles = Profiles(folder)
    with pytest.raises(StoreError):
        profiles.save("calibration", KEY, CONTENT)
    assert profiles.load("calibration", KEY) == CONTENT


def test_the_file_says_what_it_is_of(folder: Path) -> None:
    Profiles(folder).save("calibration", KEY, CONTENT)
    record = json.loads(only_file(folder).read_text())
    assert (record["format"], record["kind"], record["key"], record["content"]) == (
        "cachetune-profile", "calibration", KEY, CONTENT,
    )  # fmt: skip


def test_what_can_not_be_written_is_kept_for_this_engine_and_the_log_says_so(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profiles = Profiles(folder)
    assert profiles.keep("tuning", {"a": "b"}, {"ratio": 0.2}, "the tuned ratio")
    assert not Profiles(None).keep("tuning", {"a": "b"}, {"ratio": 0.2}, "the tuned ratio")
    assert caplog.text == ""
    (folder / "tmp").rename(folder / "moved")
    (folder / "tmp").write_text("in the way")
    assert not profiles.keep("tuning", {"a": "c"}, {"ratio": 0.3}, "the tuned ratio")
    assert "the tuned ratio holds for this engine only, since it could not be saved" in caplog.text
    assert profiles.load("tuning", {"a": "c"}) == {"ratio": 0.3}


def test_a_profile_that_was_not_written_with_the_stores_key_is_left_out(tmp_path: Path) -> None:
    with ChunkStore(tmp_path, store_key=bytes(range(32))) as store:
        seal = store.seal
    written = Profiles(tmp_path, seal=seal).save("calibration", KEY, CONTENT)
    assert written is not None
    assert Profiles(tmp_path, seal=seal).load("calibration", KEY) == CONTENT
    genuine = written.read_bytes()
    plain = Profiles(tmp_path).save("calibration", KEY, {"ratio": 0.0})
    assert plain == written
    for forged in (plain.read_bytes(), genuine.replace(b"0.", b"1.", 1), b""):
        written.write_bytes(forged)
        assert Profiles(tmp_path, seal=seal).load("calibration", KEY) is None
    other = Profiles(tmp_path, seal=seal).save("tuning", KEY, CONTENT)
    other.write_bytes(genuine)
    assert Profiles(tmp_path, seal=seal).load("tuning", KEY) is None
