"""Each kind of file becomes a document with all its text, and the error about an unreadable file says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from cachetune_rag.text.files.corpus import Corpus, CorpusError, SourceDocument, read_passage
from cachetune_rag.text.files.readers import base, json_lines, plain
from cachetune_rag.text.files.readers.pages_pdf import PdfReader


def read(path: Path) -> SourceDocument:
    (document,) = Corpus.scan([path]).documents()
    return document


def make_pdf(path: Path, *pages: str) -> Path:
    """A PDF with a line of text a page, written by hand."""
    first = 4
    kids = " ".join(f"{first + 2 * i} 0 R" for i in range(len(pages)))
    bodies = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    for i, text in enumerate(pages):
        drawn = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET"
        bodies.append(
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents {first + 1 + 2 * i} 0 R"
            "/Resources<</Font<</F1 3 0 R>>>>>>"
        )
        bodies.append(f"<</Length {len(drawn)}>>stream\n{drawn}\nendstream")
    out, offsets = "%PDF-1.4\n", []
    for number, body in enumerate(bodies, start=1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n"
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    end = f"xref\n0 {len(bodies) + 1}\n0000000000 65535 f \n{table}trailer<</Size {len(bodies) + 1}/Root 1 0 R>>\n"
    path.write_bytes(f"{out}{end}startxref\n{len(out)}\n%%EOF".encode())
    return path


# -- tables -----------------------------------------------------------------------------------------------------------


def test_a_row_is_a_passage_with_the_names_of_its_columns(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        '\ufeffname,weight,note\r\nlamp,3 kg,"two\r\nlines"\r\n,,\r\nrope,,\r\nx,y,z,more\r\n'
    )
    document = read(tmp_path / "t.csv")
    assert (document.id, document.text, document.chunks) == ("t.csv", None, None)
    assert document.passages == (
        "name: lamp\nweight: 3 kg\nnote: two\r\nlines\n",
        "name: rope\n",
        "name: x\nweight: y\nnote: z\nmore\n",
    )
    # Rows keep apart, and only what is too long is cut.
    assert document.cut(lambda text: [text[:12], text[12:]] if len(text) > 12 else [text])[2:3] == ["name: rope\n"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_columns_may_be_divided_in_several_ways(tmp_path: Path, delimiter: str) -> None:
    (tmp_path / "t.csv").write_text(delimiter.join(["a", '"b, c; d"', "e"]) + "\n" + delimiter.join("123") + "\n")
    assert read(tmp_path / "t.csv").passages == ("a: 1\nb, c; d: 2\ne: 3\n",)


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("text\tn\n" + "x" * 500_000 + "\t1\n")
    assert read(tmp_path / "t.tsv").passages == (f"text: {'x' * 500_000}\nn: 1\n",)


def test_a_table_without_rows_is_empty(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n")
    assert read(tmp_path / "t.csv").empty
    (tmp_path / "t.csv").write_text("")
    assert read(tmp_path / "t.csv").empty


# -- JSON lines -------------------------------------------------------------------------------------------------------


def test_ndjson_is_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.ndjson").write_text('{"id": "n", "text": "t"}\n')
    assert (read(tmp_path / "a.ndjson").id, read(tmp_path / "a.ndjson").text) == ("n", "t")


# -- web pages --------------------------------------------------------------------------------------------------------


def test_a_page_gives_what_it_says(tmp_path: Path) -> None:
    pytest.importorskip("bs4")
    pytest.importorskip("markdownify")
    (tmp_path / "p.html").write_text(
        "<html><head><title>The lamp</title><style>b {}</style></head><body><script>bad()</script>"
        "<p>Hold the <b>red</b> <a href='x.html'>reset_button</a>.<br>Wait.<!-- no --><p>Then:<ul><li>one<li>two</ul>"
        "<table><tr><th>part</th></tr><tr><td>oil</td></tr></table></body>"
    )
    text = read(tmp_path / "p.html").text
    assert text is not None
    assert text.startswith("# The lamp\n\nHold the **red** reset_button.\nWait.\n\nThen:\n\n- one")
    assert "| part |\n| --- |\n| oil |" in text
    for unsaid in ("bad()", "b {}", "x.html", "<", "no --"):
        assert unsaid not in text
    assert read_passage(tmp_path / "p.html") == text


def test_a_page_tells_its_encoding(tmp_path: Path) -> None:
    pytest.importorskip("bs4")
    pytest.importorskip("markdownify")
    (tmp_path / "p.htm").write_bytes('<meta charset="latin1"><p>café'.encode("latin1"))
    assert read(tmp_path / "p.htm").text == "café\n"
    (tmp_path / "p.htm").write_bytes("<p>灯台".encode("utf-16"))
    assert read(tmp_path / "p.htm").text == "灯台\n"


def test_a_page_nested_without_end_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("bs4")
    pytest.importorskip("markdownify")
    (tmp_path / "p.html").write_text("<div>" * 3000 + "x")
    with pytest.raises(CorpusError, match=r"p\.html can't be read as HTML \(RecursionError"):
        read(tmp_path / "p.html")


def test_a_page_nested_without_end_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bs4 = pytest.importorskip("bs4")
    pytest.importorskip("markdownify")
    begun: list[str] = []
    real = bs4.BeautifulSoup.handle_starttag
    monkeypatch.setattr(
        bs4.BeautifulSoup, "handle_starttag", lambda *args, **kwargs: (begun.append(args[1]), real(*args, **kwargs))[1]
    )
    (tmp_path / "p.html").write_text("<p>sound</p>" * 3000 + "<div>" * 50_000 + "x")
    with pytest.raises(CorpusError, match="nested more than"):
        read(tmp_path / "p.html")
    assert len(begun) < 10_000


# -- PDF --------------------------------------------------------------------------------------------------------------


def test_a_pdf_without_an_end_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pypdf = pytest.importorskip("pypdf")
    whole = make_pdf(tmp_path / "whole.pdf", "It turns.").read_bytes()
    (tmp_path / "cut.pdf").write_bytes(whole[:-2] + b"\n")
    (tmp_path / "followed.pdf").write_bytes(whole + b"\n" * (1 << 20))
    for name in ("cut.pdf", "followed.pdf"):
        assert read(tmp_path / name).text == "It turns.\n"
    monkeypatch.setattr(pypdf, "PdfReader", None)
    (tmp_path / "p.pdf").write_bytes(whole[: whole.rindex(b"%%EOF")] + b"0 %%EOF of no line\n" * 100_000)
    with pytest.raises(CorpusError, match=r"p\.pdf has no end mark \(%%EOF\), so a part of it is missing"):
        read(tmp_path / "p.pdf")


def test_a_pdf_gives_the_text_of_its_pages(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    path = make_pdf(tmp_path / "Lamp.PDF", "It turns.", "", "Every twelve seconds.")
    document = read(path)
    assert (document.id, document.text) == ("Lamp.PDF", "It turns.\n\nEvery twelve seconds.\n")
    assert document.size == path.stat().st_size


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"hello"), "is no PDF, although it is named like one"),
        (lambda path: path.write_bytes(b"%PDF-1.4 rubbish\n%%EOF"), r"can't be read as a PDF \("),
        (lambda path: make_pdf(path, ""), "holds no text"),
    ],
)
def test_a_pdf_without_text_says_why(tmp_path: Path, make: object, message: str) -> None:
    pytest.importorskip("pypdf")
    assert callable(make)
    make(tmp_path / "a.pdf")
    with pytest.raises(CorpusError, match=rf"a\.pdf {message}"):
        read(tmp_path / "a.pdf")


def test_an_encrypted_pdf_is_refused(tmp_path: Path) -> None:
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter(clone_from=make_pdf(tmp_path / "open.pdf", "Secret."))
    writer.encrypt("password", algorithm="RC4-128")
    writer.write(tmp_path / "a.pdf")
    with pytest.raises(CorpusError, match=r"a\.pdf is encrypted"):
        read(tmp_path / "a.pdf")


# -- without the extra ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_pypdf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PdfReader, "packages", ("no_such_package",))


@pytest.mark.usefixtures("no_pypdf")
def test_without_its_package_a_file_in_a_folder_is_left_out_with_the_way_to_have_it_read(tmp_path: Path) -> None:
    for name in ("a.pdf", "b.pdf"):
        make_pdf(tmp_path / name, "text")
    (tmp_path / "c.txt").write_text("t")
    corpus = Corpus.scan([tmp_path])
    assert [document.id for document in corpus.documents()] == ["c.txt"]
    told = (
        "Left out 2 .pdf: reading PDF needs no_such_package: pip install 'cachetune-rag[files]', then run this again."
    )
    assert corpus.left_out.lines() == corpus.left_out.needs() == [told]
    (tmp_path / "c.txt").unlink()
    with pytest.raises(CorpusError, match=r"no documents in .*\nLeft out 2 \.pdf: reading PDF needs"):
        Corpus.scan([tmp_path])


@pytest.mark.usefixtures("no_pypdf")
@pytest.mark.parametrize("reading", [lambda path: Corpus.scan([path]), read_passage])
def test_without_its_package_a_file_that_was_named_is_refused(tmp_path: Path, reading: object) -> None:
    assert callable(reading)
    path = make_pdf(tmp_path / "a.pdf", "text")
    with pytest.raises(CorpusError, match=r"a\.pdf can't be read yet: reading PDF needs .*cachetune-rag\[files\]"):
        reading(path)


# -- too much ---------------------------------------------------------------------------------------------------------


def test_what_would_not_fit_into_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 9000)
    with path.open("r+b") as file:
        file.truncate(100 << 30)  # of which the disk holds nothing
    with pytest.raises(CorpusError, match=r"a\.txt is larger than 256 MiB"):
        Corpus.scan([path])
    monkeypatch.setattr(json_lines, "MOST_BYTES", 1 << 20)
    (tmp_path / "a.jsonl").write_text('{"id": "a", "text": "' + "x" * (1 << 20) + '"}\n')
    with pytest.raises(CorpusError, match=r"a\.jsonl:1 is longer than"):
        read(tmp_path / "a.jsonl")


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("small")
    corpus = Corpus.scan([path])
    monkeypatch.setattr(base, "MOST_BYTES", 10)
    path.write_text("x" * 11)
    with pytest.raises(CorpusError, match="is larger than"):
        list(corpus.documents())


def test_a_pdf_named_as_text_says_how_to_name_it() -> None:
    with pytest.raises(CorpusError, match=r"a PDF, which is read if its name ends in \.pdf"):
        plain.refuse_binary(b"%PDF-1.7", Path("a.txt"))
