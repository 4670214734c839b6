"""What is handed to actors: documents from rows, cut, and put together by their tokens. No cluster is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from stored import CUT, ROWS, by_one_process, contents, rows_of

pytest.importorskip("pyarrow")
pytest.importorskip("ray")

import ray

from cachetune_rag.cli.console import UsageError
from cachetune_rag.errors import CacheTuneError, ConfigError, ModelLoadError
from cachetune_rag.text.files.corpus import CorpusError
from cachetune_ray import failures, here, tries
from cachetune_ray.documents import Columns, row_of
from cachetune_ray.job import _Done, pool_of, precompute
from cachetune_ray.sources import Sources, _checked, _rows
from cachetune_ray.tries import Tries
from cachetune_ray.work import Cutter
from cachetune_ray.worker import EngineToMake, Worker
from cachetune_store import StoreError

COLUMNS = Columns()


@pytest.fixture(scope="module")
def cutter(tmp_path_factory: pytest.TempPathFactory) -> Cutter:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(folder)
    return Cutter(str(folder), None, None, 16, 100, COLUMNS)


def test_an_error_comes_back_as_it_was_raised(cutter: Cutter) -> None:
    import pyarrow

    (bad,) = [table.to_pylist()[0] for table in cutter(pyarrow.Table.from_pylist([text_row("a", None)]))]
    with pytest.raises(ConfigError, match="document 'a' has neither"):
        _Done(None).add(bad)
    for error in (CorpusError("x"), StoreError("x"), ModelLoadError("x"), UsageError("x")):
        kind = CacheTuneError if isinstance(error, UsageError) else type(error)
        with pytest.raises(kind, match="x") as raised:
            failures.check({"error": failures.told(error)})
        assert type(raised.value) is kind


def text_row(name: Any, text: str | None, **more: Any) -> dict[str, Any]:
    return {"id": name, "text": text, **more}


def test_work_has_documents_up_to_its_tokens_and_a_large_one_alone(cutter: Cutter) -> None:
    rows = [text_row("a", "x" * 40), text_row("b", "y" * 60), text_row("c", "z" * 500), text_row("d", "w" * 10)]
    work = list(cutter.rows(rows))
    assert [[each["id"] for each in row["documents"]] for row in work] == [["a", "b"], ["c"], ["d"]]
    assert [row["size"] for row in work] == [100, 500, 10]
    assert all(len(chunk) <= 16 for row in work for each in row["documents"] for chunk in each["chunks"])
    assert "".join(work[1]["documents"][0]["chunks"]) == "z" * 500


def test_chunks_are_kept_and_what_has_no_text_is_told(cutter: Cutter) -> None:
    rows = [
        {"id": "a", "chunks": ["one passage that is longer than sixteen", "two"], "text": None},
        text_row("nothing", " \n"),
        {"id": "broken.pdf", "failed": "not a PDF", "size": 7},
    ]
    (row,) = cutter.rows(rows)
    assert row["documents"] == [{"id": "a", "chunks": ["one passage that is longer than sixteen", "two"]}]
    assert row["empty"] == ["nothing"]
    assert row["failed"] == [{"id": "broken.pdf", "why": "not a PDF"}]
    assert row["size"] == 42 + 2 + 7


def test_what_an_actor_is_handed_is_one_row_a_table(cutter: Cutter) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist([text_row(i, "x" * 90) for i in range(3)])
    assert [t.num_rows for t in cutter(table)] == [1, 1, 1]
    assert [t.to_pylist()[0]["documents"][0]["id"] for t in cutter(table)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (text_row(None, "x"), "document's id is None"),
        (text_row("", "x"), "document's id is ''"),
        (text_row(True, "x"), "document's id is True"),
        (text_row("a", None), "neither of 'text' and 'chunks'"),
        ({"id": "a", "text": "x", "chunks": ["x"]}, "both of 'text' and 'chunks'"),
        (text_row("a", 7), "text is 7"),
        ({"id": "a", "chunks": [1]}, r"chunks is \[1\]"),
    ],
)
def test_a_row_that_is_no_document_is_named(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        COLUMNS.document(row)


def test_missing_columns_are_named() -> None:
    COLUMNS.check(["text", "id", "url"])
    with pytest.raises(ConfigError, match="'url', 'body': it needs 'id'"):
        COLUMNS.check(["url", "body"])
    Columns("url", "body").check(["url", "body"])


def test_arguments_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dataset is 'corpus', a str: use a dataset of Ray Data"):
        precompute("corpus", "model", tmp_path)
    import ray

    class Rows(ray.data.Dataset):
        _current_executor = None

        def __init__(self) -> None:
            pass

        def schema(self, *_: Any) -> Any:
            raise AssertionError("nothing is read")

    for arguments, said in (
        ({"actors": 0}, "actors is 0"),
        ({"chunk_tokens": 2}, "chunk_tokens is 2"),
        ({"work_tokens": "many"}, "work_tokens is 'many'"),
        ({"id_column": ""}, "id_column is ''"),
        ({"progress": 3}, "progress is 3"),
        ({"codecs": "int8"}, "codecs"),
        ({"store": None}, "store is None"),
        ({"model": 5}, "model is 5"),
    ):
        given = {"model": "model", "store": tmp_path, **arguments}
        with pytest.raises(ConfigError, match=said):
            precompute(Rows(), **given)


def test_two_documents_with_one_id_are_refused() -> None:
    told: list[int] = []
    done = _Done(lambda summary: told.append(summary.documents))
    row = dict.fromkeys(("documents", "chunks", "skipped", "tokens", "bytes", "size", "evicted", "lead_ins"), 1)
    done.add({**row, "empty": [], "failed": [["f", "why"]], "worker": "a", "ids": ["a"]})
    done.add({**row, "empty": ["e"], "failed": [], "worker": "b", "ids": ["b"]})
    assert told == [1, 2]
    assert (done.summary.chunks, done.summary.workers, done.summary.empty) == (2, 2, ("e",))
    assert done.summary.failed == (("f", "why"),)
    with pytest.raises(ConfigError, match="two documents of the dataset have the id 'a'"):
        done.add({**row, "empty": [], "failed": [], "worker": "a", "ids": ["c", "a"]})


def test_two_workers_store_what_one_process_stores(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an actor runs, in this process. That Ray runs it in two others gives the same: test_precompute.py."""
    monkeypatch.setattr(
        ray, "get_runtime_context", lambda: type("Here", (), {"get_node_id": staticmethod(lambda: "node")})()
    )
    rows = ROWS[:6]
    cutter = Cutter(str(model), None, None, CUT["chunk_tokens"], CUT["work_tokens"], COLUMNS)
    made = EngineToMake(str(model), str(tmp_path / "kv"), {"host_budget": 0}, rows, cutter, tries=Tries())
    two = [Worker(made), Worker(made)]
    done = _Done(None)
    work = list(cutter.rows(rows))
    for number, row in enumerate(work):
        done.add(two[number % 2](row))
    assert len(work) > 3, "both had several rows"
    found = contents(model, tmp_path / "kv")
    assert found == by_one_process(model, tmp_path / "one", rows)
    assert rows_of(model, tmp_path / "kv") == rows_of(model, tmp_path / "one")
    assert (done.summary.documents, done.summary.skipped) == (len(rows), 0)
    assert done.summary.chunks == sum(map(len, found.values()))


def test_a_document_that_kills_every_actor_is_named(model: Path, tmp_path: Path) -> None:
    """An actor that dies has begun its row and never says that it is done."""
    begun = Tries()
    cutter = Cutter(str(model), None, None, 100, 1000, COLUMNS)

    def actor() -> Worker:
        return Worker(EngineToMake(str(model), str(tmp_path / "kv"), {"host_budget": 0}, [], cutter, tries=begun))

    work = {"documents": [{"id": "huge", "chunks": ["A chunk."]}], "size": 8, "empty": [], "failed": []}
    for _ in range(tries.MOST):
        begun.begin(["huge"])  # and killed
    one = actor()
    with pytest.raises(CacheTuneError, match="3 actors, one after the other, died while they computed document 'huge'"):
        failures.check(one(work))
    other = {**work, "documents": [{"id": "small", "chunks": ["Another."]}]}
    for _ in range(tries.MOST + 1):  # one that is done may come again
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(ray, "get_runtime_context", lambda: type("Here", (), {"get_node_id": lambda self: "n"})())
            failures.check(one(other))
    with pytest.raises(CacheTuneError, match=r"one of the documents 'a', 'b', 'c', 'd', 'e' and 2 more"):
        tries.check(tries.MOST + 1, list("abcdefg"))


def test_what_is_on_this_machine_is_refused_where_it_is_no_part_of_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(here.client, "is_connected", lambda: True)
    with pytest.raises(ConfigError, match=r"the corpus .*a\.txt is on this machine, which is no part of the cluster"):
        Sources.scan([corpus(tmp_path / "corpus")]).dataset()
    with pytest.raises(ConfigError, match="the store /kv is on this machine"):
        here.on_this_machine("the store /kv")


def test_what_a_table_has_is_checked_as_any_other_row() -> None:
    assert _checked({"id": 7, "text": "x", "size": 3})["id"] == "7"
    for row, said in (
        ({"id": None, "text": "x"}, "document's id is None"),
        ({"id": True, "text": "x"}, "document's id is True"),
        ({"id": 1.0, "text": "x"}, "document's id is 1.0"),
        ({"id": "a", "text": 5}, "document 'a': text is 5"),
    ):
        with pytest.raises(ConfigError, match=said):
            failures.check(_checked({**row, "size": 3}))


def test_a_device_without_gpus_takes_none() -> None:
    assert pool_of("auto", None, None, 4) == (4, 1)
    assert pool_of("auto", 8, None, 0) == (8, 0)
    assert pool_of("cpu", None, None, 4) == (1, 0)
    assert pool_of("cpu", 6, None, 4) == (6, 0)
    assert pool_of("auto", 2, 0.5, 4) == (2, 0.5)


def corpus(folder: Path) -> Path:
    (folder / "below").mkdir(parents=True)
    (folder / "a.txt").write_text("A text.")
    (folder / "below" / "b.jsonl").write_text(
        '{"id": "x", "text": "A line."}\n{"id": "y", "chunks": ["One.", "Two."]}\n'
    )
    (folder / "c.md").write_bytes(b"\xff\xfe\x00 no text")
    (folder / "d.zip").write_bytes(b"PK")
    return folder


@pytest.mark.parametrize("as_url", [False, True])
def test_files_of_a_folder_become_rows(tmp_path: Path, as_url: bool) -> None:
    folder = corpus(tmp_path / "corpus")
    found = Sources.scan([folder.as_uri() if as_url else folder])
    assert found.left_out.unread == {".zip": 1}
    rows = list(_rows(found.far if as_url else found.near))
    known = {row["id"]: COLUMNS.document(row) for row in rows if row.get("failed") is None}
    assert {name: each.text or each.chunks for name, each in known.items()} == {
        "a.txt": "A text.",
        "x": "A line.",
        "y": ("One.", "Two."),
    }
    reasons = [row["failed"] for row in rows if row.get("failed")] + [why for _, why in found.left_out.failed]
    assert len(reasons) == 1
    assert "c.md" in reasons[0]
    if as_url:  # of files of this machine, the list is made of those that can be read
        assert found.size == sum(row["size"] for row in rows)


def test_a_url_with_nothing_below_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no documents below file://"):
        Sources.scan([tmp_path.as_uri()])
    with pytest.raises(CorpusError, match=r"nothing\.txt can't be read|no documents below|can't be read"):
        Sources.scan([f"{tmp_path.as_uri()}/nothing.txt"])


def test_a_row_has_what_the_reader_found(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("id,text\n1,first\n2,second\n")
    rows = list(_rows(Sources.scan([tmp_path / "table.csv"]).near))
    assert [COLUMNS.document(row) for row in rows]
    assert rows == [row_of(COLUMNS.document(row)) for row in rows]
