"""Reading files and splitting texts: nothing is lost or guessed, and every refusal names its place."""

from __future__ import annotations

import json
import os
import socket
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tokenizer

from cachetune_rag.errors import ConfigError
from cachetune_rag.text.files.corpus import Corpus, CorpusError, read_text
from cachetune_rag.text.splitting import Splitter

PROSE = (
    "The lighthouse was built in 1871. Three brothers did it! Who paid?\n\n"
    "Its lamp burned whale oil until 1902, when paraffin reached the island.\n  \n"
    "The keeper's log names eleven ships (and one balloon.) Visitors climb 214 steps.\n"
)


def ids(corpus: Corpus) -> list[str]:
    return [document.id for document in corpus.documents()]


def jsonl(path: Path, *records: object) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


# -- finding files ----------------------------------------------------------------------------------------------------


def test_folders_are_walked_in_order_and_hidden_or_other_files_left_out(tmp_path: Path) -> None:
    for name in [
        "b.txt",
        "a/z.MD",
        "a/b.rst",
        "c.markdown",
        ".hidden.txt",
        ".git/x.txt",
        "image.png",
        "notes.log",
        "d.jsonl",
    ]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"id": "line", "text": "t"}' if name == "d.jsonl" else name)
    assert ids(Corpus.scan([tmp_path])) == ["a/b.rst", "a/z.MD", "b.txt", "c.markdown", "line"]


def test_ids_do_not_depend_on_how_the_folder_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs" / "sub").mkdir(parents=True)
    (tmp_path / "docs" / "sub" / "a.txt").write_text("t")
    monkeypatch.chdir(tmp_path / "docs")
    spellings: list[str | Path] = [tmp_path / "docs", ".", "../docs/", "./"]
    assert {tuple(ids(Corpus.scan([s]))) for s in spellings} == {("sub/a.txt",)}


def test_a_file_named_itself_is_read_whatever_its_extension(tmp_path: Path) -> None:
    (tmp_path / "notes.log").write_text("t")
    assert ids(Corpus.scan([tmp_path / "notes.log"])) == ["notes.log"]


def test_a_file_reached_twice_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("t")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    assert ids(Corpus.scan([tmp_path, tmp_path / "a.txt"])) == ["a.txt"]


def test_a_link_to_a_folder_above_does_not_loop(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("t")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert ids(Corpus.scan([tmp_path])) == ["a.txt"]


def test_two_files_with_one_id_are_refused(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
    with pytest.raises(CorpusError, match=r"x/a\.txt and .*y/a\.txt would both be document 'a\.txt'"):
        Corpus.scan([tmp_path / "x", tmp_path / "y"])


def test_paths_that_hold_no_text_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="nowhere does not exist"):
        Corpus.scan([tmp_path / "nowhere"])
    with pytest.raises(CorpusError, match="a path is empty"):  # not the current folder
        Corpus.scan([tmp_path, ""])
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(CorpusError, match=rf"no documents in {tmp_path}.*\.txt, \.md"):
        Corpus.scan([tmp_path])
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(CorpusError, match="no regular file"):
        Corpus.scan([tmp_path / "pipe.txt"])


@pytest.mark.parametrize("content", [b"a\0b", b"%PDF-1.7 text", b"PK\x03\x04", b"\x1f\x8bx"])
def test_binary_files_are_refused_before_anything_is_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=r"a\.txt is a binary file"):
        Corpus.scan([tmp_path])


def test_a_nul_byte_far_inside_is_found_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 20_000 + b"\0")
    with pytest.raises(CorpusError, match=r"a\.txt holds NUL bytes"):
        ids(Corpus.scan([tmp_path]))


def test_utf16_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-16")
    with pytest.raises(CorpusError, match=r"a\.txt is UTF-16, not UTF-8: convert it"):
        Corpus.scan([tmp_path])


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")).write_text("t")
    with pytest.raises(CorpusError, match="not UTF-8 and can't be a document id"):
        Corpus.scan([tmp_path])


# -- what folders hold besides ----------------------------------------------------------------------------------------


def test_what_cannot_be_read_in_a_folder_is_left_out_and_told(tmp_path: Path) -> None:
    (tmp_path / "ok.md").write_text("steps")
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    jsonl(tmp_path / "lines.jsonl", {"id": "first", "text": "t"}, "{broken")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")).write_text("t")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "socket.txt"))
        corpus = Corpus.scan([tmp_path])
        assert ids(corpus) == ["first", "ok.md"]
    told = {path.name: reason for path, reason in corpus.left_out.failed}
    assert "leads back to itself" in told["self.txt"]
    assert "is a link to something that does not exist" in told["gone.txt"]
    for name in ("pipe.txt", "device.txt", "socket.txt"):
        assert "is no regular file" in told[name]
    assert "is a binary file" in told["binary.txt"]
    assert "latin.txt:1 is not UTF-8" in told["latin.txt"]
    assert "lines.jsonl:2 is not JSON" in told["lines.jsonl"]
    assert "What comes before it in the file was read." in told["lines.jsonl"]
    assert "is not UTF-8 and can't be a document id" in told["\udcff.txt"]
    assert len(told) == 9
    lines = corpus.left_out.lines()
    assert len(lines) == 9
    assert all(line.startswith("Left out: ") for line in lines)
    assert sorted(entry["path"] for entry in corpus.left_out.as_dict()["failed"]) == sorted(
        str(tmp_path / name) for name in told
    )


def test_other_endings_hidden_files_and_linked_folders_are_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.png", "c.PNG", "d.docx", "README", ".git", "e.\x1b[2J", "f.and so on and on"):
        (tmp_path / name).write_text("t")
    (tmp_path / "link").symlink_to(tmp_path)
    corpus = Corpus.scan([tmp_path])
    assert ids(corpus) == ["a.txt"]
    assert corpus.left_out.lines() == [
        "Left out, as nothing reads them: 2 .png, 1 without an ending, 1 .docx, 1 .\\x1b[2j, 1 with other endings.",
        "Left out 1 hidden file or folder and 1 link to a folder.",
    ]
    counts = corpus.left_out.as_dict()
    assert (counts["unread"][".png"], counts["hidden"], counts["linked_folders"]) == (2, 1, 1)


def test_many_unreadable_files_are_named_in_part_and_counted(tmp_path: Path) -> None:
    (tmp_path / "ok.md").write_text("steps")
    for i in range(30):
        (tmp_path / f"{i:02}.txt").symlink_to(f"{i:02}.txt")
    *named, more = Corpus.scan([tmp_path]).left_out.lines()
    assert len(named) == 10
    assert more == "Left out, as they can't be read either: 20 .txt; --json names them all."


def test_files_that_vanish_or_change_meanwhile_are_left_out(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("text")
    corpus = Corpus.scan([tmp_path])
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.txt").unlink()
    os.mkfifo(tmp_path / "b.txt")  # whose opening would wait for a writer
    skipped: list[int] = []
    assert [document.id for document in corpus.documents(skipped.append)] == ["c.txt"]
    assert sum(skipped) == 8
    assert [path.name for path, _ in corpus.left_out.failed] == ["a.txt", "b.txt"]


def test_what_was_named_ends_the_run_where_it_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "ok.md").write_text("steps")
    (tmp_path / "self.txt").symlink_to("self.txt")
    with pytest.raises(CorpusError, match=r"self\.txt is a link that leads back to itself"):
        Corpus.scan([tmp_path / "ok.md", tmp_path / "self.txt"])
    corpus = Corpus.scan([tmp_path / "ok.md"])
    (tmp_path / "ok.md").unlink()
    with pytest.raises(CorpusError, match=r"ok\.md does not exist"):
        ids(corpus)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "ok.md").write_text("steps")
    (tmp_path / "mine.txt").write_text("t")
    (tmp_path / "mine.txt").chmod(0)
    (tmp_path / "closed").mkdir(mode=0)
    try:
        corpus = Corpus.scan([tmp_path])
        assert ids(corpus) == ["ok.md"]
        assert [path.name for path, _ in corpus.left_out.failed] == ["closed", "mine.txt"]
        assert all("Check its permissions." in reason for _, reason in corpus.left_out.failed)
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_a_folder_that_refuses_to_be_searched_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ok.md").write_text("steps")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(folder: Path) -> object:
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    corpus = Corpus.scan([tmp_path])
    assert ids(corpus) == ["ok.md"]
    assert [reason for _, reason in corpus.left_out.failed] == [
        f"{tmp_path / 'closed'} can't be searched: Permission denied. Check its permissions."
    ]
    with pytest.raises(CorpusError, match="closed can't be searched"):
        Corpus.scan([tmp_path / "closed"])


def test_folders_may_be_nested_deeper_than_calls(tmp_path: Path) -> None:
    depth = 1500
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("a.txt", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    (tmp_path / "b.txt").write_text("t")
    bottom = tmp_path.joinpath(*["d"] * depth)
    try:
        assert ids(Corpus.scan([tmp_path])) == ["b.txt", "d/" * depth + "a.txt"]
    finally:
        (bottom / "a.txt").unlink()
        os.removedirs(bottom)  # what removes folders after tests is recursive itself


def test_odd_names_are_ids_like_others(tmp_path: Path) -> None:
    for name in ("two\nlines.txt", "\x1b[2J.txt", " .txt", "-r.txt", "灯台.md"):
        (tmp_path / name).write_text("t")
    assert set(ids(Corpus.scan([tmp_path]))) == {"two\nlines.txt", "\x1b[2J.txt", " .txt", "-r.txt", "灯台.md"}


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home" / "docs").mkdir(parents=True)
    (tmp_path / "home" / "docs" / "a.txt").write_text("t")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert ids(Corpus.scan(["~/docs"])) == ["a.txt"]
    assert read_text("~/docs/a.txt") == "t"


# -- reading ----------------------------------------------------------------------------------------------------------


def test_text_is_kept_to_the_character(tmp_path: Path) -> None:
    text = "\r\n one\r\ntwo\u2028three\x0c\n\n  "
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (document,) = Corpus.scan([tmp_path]).documents()
    assert document.text == text
    assert document.size == len(text.encode()) + 3
    assert read_text(tmp_path / "a.txt") == text


def test_bytes_that_are_not_utf8_are_refused_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nna\xefve\n")
    with pytest.raises(CorpusError, match=r"a\.txt:3 is not UTF-8 \(byte 0xef\)"):
        ids(Corpus.scan([tmp_path]))


def test_jsonl_gives_texts_and_chunks(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl", {"id": "a", "text": "é\n"}, "", {"id": 7, "chunks": ["x", "y"], "title": "ignored"}, "  "
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    first, second = Corpus.scan([path]).documents()
    assert (first.id, first.text, first.chunks) == ("a", "é\n", None)
    assert (second.id, second.text, second.chunks) == ("7", None, ("x", "y"))
    assert second.where == f"{path}:3"
    assert not first.empty


@pytest.mark.parametrize(
    "record", [{"id": "a", "text": " \n"}, {"id": "a", "chunks": []}, {"id": "a", "chunks": ["", " "]}]
)
def test_documents_without_text_say_so(tmp_path: Path, record: object) -> None:
    (document,) = Corpus.scan([jsonl(tmp_path / "a.jsonl", record)]).documents()
    assert document.empty


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b", "text": "t"', r"is not JSON \(.* at column \d+\)"),
        ("[1]", "is a list, not an object"),
        ("null", "is null, not an object"),
        ('{"text": "t"}', 'has no "id"'),
        ('{"id": "", "text": "t"}', '"id" is an empty string'),
        ('{"id": true, "text": "t"}', '"id" is true or false'),
        ('{"id": 1.5, "text": "t"}', '"id" is a number'),
        ('{"id": "b"}', 'has neither of "text" and "chunks"'),
        ('{"id": "b", "text": "t", "chunks": ["t"]}', 'has both of "text" and "chunks"'),
        ('{"id": "b", "text": ["t"]}', '"text" is a list: use a string'),
        ('{"id": "b", "text": null}', '"text" is null: use a string'),
        ('{"id": "b", "chunks": "t"}', '"chunks" is a string: use a list of strings'),
        ('{"id": "b", "chunks": ["t", 3]}', r'"chunks\[1\]" is a number: use a string'),
        ('{"id": "b", "text": "\\ud800"}', '"text" holds half of a surrogate pair'),
        ('{"id": "a", "text": "t"}', r"document 'a' came before, as document 1 of .*a\.jsonl"),
        ("[" * 100_000, "is not JSON"),
        ('{"id": "b", "text": NaN}', '"text" is a number'),
    ],
)
def test_a_broken_line_is_named_and_those_before_it_are_given(tmp_path: Path, line: str, message: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"id": "a", "text": "t"}, line)
    documents = Corpus.scan([path]).documents()
    assert next(documents).id == "a"
    with pytest.raises(CorpusError, match=rf"a\.jsonl:2.*{message}"):
        next(documents)


def test_a_corpus_is_never_held_whole(tmp_path: Path) -> None:
    filler = "x" * 10_000
    jsonl(tmp_path / "a.jsonl", *({"id": f"d{i}", "text": filler} for i in range(2000)))
    tracemalloc.start()
    try:
        assert sum(1 for _ in Corpus.scan([tmp_path]).documents()) == 2000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000  # of 20 MB
    finally:
        tracemalloc.stop()


# -- splitting --------------------------------------------------------------------------------------------------------


def byte_count(text: str) -> int:
    return len(tokenizer()(text, add_special_tokens=False)["input_ids"])


def word_count(text: str) -> int:
    return len(text.split())


def joint_count(text: str) -> int:
    """Like some tokenizers, this one gives more tokens for joined texts than for separate ones."""
    return len(text) + text.count("ab")


def test_short_texts_stay_whole() -> None:
    assert Splitter(byte_count, 512).split(PROSE) == [PROSE]
    assert Splitter(byte_count, 512).split("") == []


def test_texts_are_cut_at_paragraphs_then_sentences_then_words() -> None:
    assert Splitter(byte_count, 160).split(PROSE) == [
        PROSE[: PROSE.index("The keeper")],
        PROSE[PROSE.index("The keeper") :],
    ]
    assert Splitter(byte_count, 70).split(PROSE) == [
        "The lighthouse was built in 1871. Three brothers did it! Who paid?\n\n",
        "Its lamp burned whale oil until 1902, when paraffin reached the",
        " island.\n  \nThe keeper's log names eleven ships (and one balloon.) ",
        "Visitors climb 214 steps.\n",
    ]


def test_tables_and_code_are_cut_between_lines() -> None:
    table = "".join(f"| bolt {n} | {n * 7} pieces |\n" for n in range(40))
    code = "def total(names):\n" + "".join(f"    if names[{n}]:\n        count += {n}\n" for n in range(30))
    for text in (table, code, table.rstrip()):
        chunks = Splitter(byte_count, 100).split(text)
        assert len(chunks) > 5
        assert "".join(chunks) == text
        assert all(chunk.endswith("\n") for chunk in chunks[:-1])
    assert Splitter(byte_count, 12).split("| one | two | three | four |\n| five |")[:2] == [
        "| one | two",
        " | three |",
    ]  # a line that is too long


def test_cjk_sentences_are_sentences() -> None:
    text = "灯台は白い。海は青い。「船だ。」と言う。"
    assert Splitter(len, 9).split(text) == ["灯台は白い。", "海は青い。", "「船だ。」と言う。"]


def test_chunks_are_filled_where_pieces_take_more_tokens_apart() -> None:
    def dearer_apart(text: str) -> int:
        return len(text.split()) + 3

    chunks = Splitter(dearer_apart, 103).split(" ".join(["word"] * 1000))
    assert {len(chunk.split()) for chunk in chunks[:-1]} == {97}


@pytest.mark.parametrize("count", [byte_count, joint_count, len])
@pytest.mark.parametrize(
    "text", [PROSE * 20, "x" * 5000, " " * 3000, "\n \n" * 900, "ab " * 2000, "…" * 900, "é\r\n\r\n" * 700]
)
def test_nothing_is_lost_and_nothing_is_too_long(text: str, count: object) -> None:
    assert callable(count)
    chunks = Splitter(count, 64).split(text)
    assert "".join(chunks) == text
    assert all(0 < count(chunk) <= 64 for chunk in chunks)
    assert len(chunks) <= 2 + 3 * count(text) // 64


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.sampled_from('ab .\n\t!?)"é。」字🙂'), max_size=400), st.integers(8, 60))
def test_any_text_splits_without_loss(text: str, limit: int) -> None:
    chunks = Splitter(joint_count, limit).split(text)
    assert "".join(chunks) == text
    assert all(chunk and joint_count(chunk) <= limit for chunk in chunks)
    assert Splitter(joint_count, limit).split(text) == chunks


def test_a_character_of_more_tokens_than_the_limit_stands_alone() -> None:
    assert Splitter(lambda text: 100 * len(text), 8).split("abc") == ["a", "b", "c"]


def test_a_limit_too_small_is_refused() -> None:
    with pytest.raises(ConfigError, match="chunk tokens is 7: use 8 or more"):
        Splitter(word_count, 7)
