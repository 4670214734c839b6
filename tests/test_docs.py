"""Links, files, commands, options, selectors and metrics that README and docs name exist, and the first example runs."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from tiny import llama, tokenizer

from cachetune_rag import CacheTune
from cachetune_rag.cli.app import app
from cachetune_rag.selection import get_selector, selector_names
from cachetune_vllm.serve import app as serving

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("*/README.md")),
    *sorted(ROOT.glob("benchmarks/*/**/README.md")),
]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
MADE_BY_RUNS = {"build", "damaged", "inputs", "profiles"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    return (ROOT / name).read_text()


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))


def headings(text: str) -> set[str]:
    """Anchors that GitHub makes of them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def paths_of(text: str) -> set[str]:
    """Files and folders of the repository that a page names in its prose: what has a slash in it and looks like one."""
    text = FENCE.sub("", text)
    named = set(re.findall(r"`((?:[\w.-]+/)+(?:[\w.-]+\.(?:py|md|svg|json|toml))?)`", text))
    named |= set(re.findall(r"`((?:benchmarks|tests|examples|docs|store|adapters|cachetune_rag)/[\w./-]+)`", text))
    return {name for name in named if name.split("/")[0] not in MADE_BY_RUNS}


def find(name: str) -> Path | None:
    """A path that a page names, from the root, or short for one in the package."""
    return next((there for folder in (ROOT, ROOT / "cachetune_rag") if (there := folder / name).exists()), None)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_files_are_there(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = path.parent / name if name else path
        assert there.exists(), target
        if anchor:
            assert anchor in headings(there.read_text()), target
    for name in paths_of(text) if path.name != "CHANGELOG.md" else ():  # which tells of what was
        assert find(name) is not None or (path.parent / name).exists(), f"{name} is not there (any more)"


POINTER = re.compile(r"""docs/([\w-]+\.md)(?:\#([\w-]+)|,?[ ]\(?(["'])(.+?)\3)?""", re.VERBOSE)
"""How code names a page, perhaps with the anchor of a section, or with a title in quotation marks behind it."""


def test_pages_and_sections_that_code_and_tables_of_results_name_are_there() -> None:
    folders = ("cachetune_rag", "store", "adapters", "benchmarks", "examples", "tests", "tools")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    found = 0
    for file in [*files, *(ROOT / "benchmarks/results").rglob("*.md")]:
        for name, anchor, _, title in POINTER.findall(re.sub(r"\s+", " ", file.read_text())):
            found += 1
            assert (ROOT / "docs" / name).exists(), f"{file}: docs/{name}"
            text = page(f"docs/{name}")
            assert not anchor or anchor in headings(text), f"{file}: docs/{name}#{anchor}"
            assert title in text, f"{file}: docs/{name} has no {title!r}"
    assert found > 30


def commands_of(text: str, start: str) -> Iterator[list[str]]:
    """Words of the command lines in fenced blocks that begin with `start`."""
    for _, block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split("#")[0].removeprefix("$ ").split()
            if " ".join(words).startswith(start):
                yield words


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_have_the_options_that_they_are_shown_with(path: Path) -> None:
    text = path.read_text()
    for _, script, *rest in commands_of(text, "python benchmarks/"):
        code = (ROOT / script).read_text()
        if "add_arguments(parser)" in code:
            code += page("benchmarks/subjects.py")
        if "from fidelity.arguments import" in code:
            code += page("benchmarks/fidelity/arguments.py")
        if "add_records(parser" in code:
            code += page("benchmarks/fidelity/inputs.py")
        assert {f'"{option}"' for option in options(" ".join(rest))} <= set(re.findall(r'"--[\w-]+"', code)), script
    for _, name, *rest in commands_of(text, "cachetune "):
        assert options(" ".join(rest)) <= options_of(name), name
    for _, target, *_ in commands_of(text, "make "):
        assert re.search(rf"^{target}:", page("Makefile"), re.MULTILINE), target


PASSED_ON = {"--port", "--max-model-len", "--gpu-memory-utilization"}
"""Options of `vllm serve` that pages show behind `cachetune serve`, which passes on what it doesn't know."""


def options_of(command: str) -> set[str]:
    if command == "serve":
        own = typer.main.get_command(serving).params
        return {option for parameter in own for option in parameter.opts} | PASSED_ON | {"--help"}
    return {option for parameter in COMMANDS[command].params for option in parameter.opts} | {"--help"}


def test_the_command_line_page_names_commands_and_options_that_there_are() -> None:
    every = set().union(*map(options_of, COMMANDS), {"--debug", "--json"})
    told: set[str] = set()
    for section in re.split(r"^## ", page("docs/cli.md"), flags=re.MULTILINE)[1:]:
        names = [name for name in section.splitlines()[0].split(", ") if name in COMMANDS]
        told.update(names)
        tables = "\n".join(re.findall(r"^\| (`-.*?) \|", section, re.MULTILINE))
        if names:
            assert options(tables) <= set().union(*map(options_of, names)), names
        assert options(section) <= every, section.splitlines()[0]
    assert told == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_page_has_every_option(command: str) -> None:
    beginning, *sections = re.split(r"^## ", page("docs/cli.md"), flags=re.MULTILINE)
    told = options(beginning)
    for section in sections:
        about = {name for name in section.splitlines()[0].split(", ") if name in COMMANDS}
        # Sections that are about no command ("Tenants") hold for all.
        if command in about or not about or (command == "explain" and "ask" in about):
            told |= options(section)
    own = {option for option in options_of(command) if option.startswith("--")} - PASSED_ON - {"--help"}
    assert own <= told, f"docs/cli.md doesn't say what they are: {sorted(own - told)}"


def test_the_selection_page_has_every_selector() -> None:
    table = page("docs/selection.md").split("## The selectors")[1].split("\n## ")[0].split("\n\n")[1]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == {
        n for n in selector_names() if type(get_selector(n)).__module__.startswith("cachetune_rag.")
    }


def test_the_first_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = (block for language, block in FENCE.findall(page("README.md")) if language == "python")
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    asked = re.findall(r'from_pretrained\("([^"]+)"', code)
    assert len(asked) == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace(asked[0], str(tmp_path / "model")), "README.md", "exec"), {})
    assert re.search(r"\b0 missed", capsys.readouterr().out)
    with CacheTune(llama(), tokenizer(), tmp_path / "kv-store") as engine:
        assert [info.id for info in engine.store.documents()] == ["lighthouse"]


def test_the_metrics_named_are_there(tmp_path: Path) -> None:
    registry = pytest.importorskip("prometheus_client").CollectorRegistry()
    from cachetune_rag.telemetry.prometheus import CacheTuneCollector

    with CacheTune(llama(), tokenizer(), tmp_path / "kv", fidelity_sample=1) as engine:
        registry.register(CacheTuneCollector(engine))
        there = {family.name for family in registry.collect()}
    section = page("docs/operations.md").split("## Prometheus")[1].split("\n## ")[0]
    for line in re.findall(r"^\| (`.+?) \| .*\|$", section, re.MULTILINE):
        first = ""
        for name in re.findall(r"`(cachetune_\w+|_\w+)`", line.split(" | ")[0]):
            if not name.startswith("_"):
                first = re.sub(r"^(cachetune(?:_tier|_fidelity)?).*", r"\1", name)
            full = first + name if name.startswith("_") else name
            if full not in ("cachetune_fidelity_top1", "cachetune_fidelity_kl"):  # only once something was compared
                assert full.removesuffix("_total") in there, full


def test_the_readme_is_short_and_its_figures_stand_in_the_docs() -> None:
    text = page("README.md")
    assert len(text.splitlines()) <= 120
    rows = [line for line in text.splitlines() if re.match(r"\| [\d,]+ \|", line)]
    assert rows
    table = page("docs/speed.md").split("## On a GPU")[1]
    for row in rows:
        context, full, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        (measured,) = (
            line for line in table.splitlines() if line.startswith(f"| {context} | ") and "`expected_error`" in line
        )
        assert full.removesuffix(" ms") in measured.split(" | ")
        assert all(cell in measured for cell in cells), row


GLOSSARY = re.findall(r"^\| \*\*(.+?)\*\* \| (.+?) \|(.*)\|$", page("docs/glossary.md"), re.MULTILINE)
"""Terms, what they mean, and the spellings that are not used for them."""


def prose(text: str) -> str:
    """A page's text without code, and without the targets of links."""
    return re.sub(r"`[^`]*`|\]\([^)]*\)", "", FENCE.sub("", text))


def written(word: str, text: str) -> list[str]:
    """Where a word stands, with what is around it; capitals count only in a word that has some."""
    capitals = 0 if re.search("[A-Z]", word) else re.IGNORECASE
    found = re.finditer(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text, capitals)
    return [text[max(0, match.start() - 40) : match.end() + 40] for match in found]


def test_the_glossary_explains_each_term_once_and_only_what_the_pages_use() -> None:
    terms = [term for term, _, _ in GLOSSARY]
    assert len(terms) > 50
    assert len(terms) == len(set(terms))
    pages = "\n".join(path.read_text() for path in PAGES if path.name != "glossary.md").lower().replace("\n", " ")
    assert not [term for term in terms if term.lower() not in pages]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_term_has_one_spelling(path: Path) -> None:
    if path.name == "glossary.md" or "benchmarks" in path.parts or path.name == "CHANGELOG.md":
        return
    text = prose(path.read_text())
    for term, _, others in GLOSSARY:
        for other in filter(None, map(str.strip, others.split(","))):
            assert not written(other, text), f"{path.name}: {other!r} is spelt {term!r} (docs/glossary.md)"


def defined(path: Path) -> set[str]:
    """Functions and classes of a file, and methods with the name of their class."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return found


def test_the_architecture_page_names_functions_that_are_where_it_says() -> None:
    steps = re.findall(r"`([\w/]+\.py)`: `([\w.]+)`", page("docs/architecture.md"))
    assert len(steps) >= 16  # eight of a request, eight of a chunk
    for file, name in steps:
        path = find(file)
        assert path is not None, f"{file} is not there any more: bring docs/architecture.md up to date"
        assert name in defined(path), f"{file} has no {name} any more: bring docs/architecture.md up to date"


def test_the_architecture_page_has_every_folder() -> None:
    text = page("docs/architecture.md")
    folders = {path.parent for path in (ROOT / "cachetune_rag").rglob("__init__.py")} - {ROOT / "cachetune_rag"}
    names = {folder.relative_to(ROOT / "cachetune_rag").as_posix() + "/" for folder in folders}
    tops = {name for name in names if name.count("/") == 1}
    assert {name for name in tops if f"| `{name}` |" not in text} == set()
    files = {path.name for path in (ROOT / "cachetune_rag").glob("[a-z]*.py")}
    assert {name for name in files if f"`{name}`" not in text} == set()


OURS = ("cachetune_rag", "cachetune_store", "langchain_cachetune", "llama_index.llms.cachetune")


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    module, names = dotted, list[str]()
    while module:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            module, _, name = module.rpartition(".")
            names.insert(0, name)
            continue
        for name in names:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_code_is_python_and_imports_what_there_is(path: Path) -> None:
    if path.name == "CHANGELOG.md":
        return
    named: set[str] = set()
    for language, block in FENCE.findall(path.read_text()):
        if language == "diff":
            block = "\n".join(line[1:] for line in block.splitlines() if line.startswith("+"))
            block = "\n".join(re.findall(r"^(?:from|import) .*", block, re.MULTILINE))
        elif language != "python":
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(OURS):
                named |= {f"{node.module}.{name.name}" for name in node.names}
    loggers = {
        name
        for file in (ROOT / "cachetune_rag").rglob("*.py")
        for name in re.findall(r'getLogger\("([\w.]+)"\)', file.read_text())
    }
    named |= set(re.findall(r"`((?:cachetune_rag|cachetune_store)(?:\.\w+)+)`", path.read_text())) - loggers
    assert {name for name in named if not resolves(name)} == set()


@pytest.mark.parametrize(
    "task",
    [
        "a codec",
        "a selector",
        "what a miss does",
        "a metric",
        "a model family",
        "a tier",
        "a kind of prompt template",
        "an option of the command line",
        "a kernel",
        "a bound or statistic of calibration",
    ],
)
def test_the_architecture_page_says_which_files_a_change_touches(task: str) -> None:
    section = page("docs/architecture.md").split("## Where to add things")[1]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith(f"| {task}")]
    assert rows
    for _, touch, *_ in rows:
        assert any(find(name) for name in re.findall(r"`([\w./]+/[\w./]*)`", touch)), touch
