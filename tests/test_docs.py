"""README and docs: their commands run, their links exist, their errors and figures are real."""

import ast
import functools
import importlib.util
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
GUIDES = [ROOT / "pretraining" / "README.md", ROOT / "lessons" / "README.md"]


def load(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    path = ROOT / "docs" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(f"docs_{name}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


check, record, reading = load("check"), load("record"), load("reading")
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pages", "least"),
    [(PAGES[:1], 3), pytest.param(PAGES[1:], 13, marks=pytest.mark.nightly)],
    ids=("README", "the others"),
)
def test_every_block_runs_or_says_why_not(
    pages: list[Path], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    done = list(check.check(pages))
    assert [f"{block}\n{block.error}" for block in done if block.error] == []
    assert sum(not block.reason for block in done) >= least


def test_a_block_that_fails_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "furnish", lambda folder: None)
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\nfalse\n```\n```python\nx = 1\n```\n```python\nassert x == 2\n```\n"
        "<!-- check: 1 => 2 -->\n```python\nx = 1\n```\n```python\nassert x == 2\n```\n"
        "<!-- check: not run, no hub -->\n```sh\nfalse\n```\n<!-- check: a => b -->\n"
        "```sh\ntrue\n```\n```python\n>>> x\n3\n```\n"
    )
    done = list(check.check([page]))
    assert [bool(block.error) for block in done] == [
        True, False, True, False, False, False, True, True
    ]  # fmt: skip
    assert [block.reason for block in done if block.reason] == ["no hub"]
    assert [block.line for block in done][:3] == [1, 4, 7]


@pytest.mark.parametrize(
    "page", [*PAGES, *GUIDES], ids=lambda page: f"{page.parent.name}-{page.stem}"
)
def test_links_exist(page: Path) -> None:
    text = without_code(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    local = {tuple(link.partition("#")[::2]) for link in links if "://" not in link}
    found = {(name, part): page.parent / name if name else page for name, part in local}
    assert {link for link, path in found.items() if not path.exists()} == set()
    parts = {link: path for link, path in found.items() if link[1] and path.suffix == ".md"}
    assert {link for link, path in parts.items() if link[1] not in anchors(path)} == set()


def without_code(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub writes them behind a `#`."""
    titles = re.findall(r"^#+ (.+)$", without_code(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@functools.cache
def messages() -> list[str]:
    """Every string of the package, what is put into it at run time replaced by one character."""
    found = []
    for path in (ROOT / "minilora").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (text := text_of(node)) is not None:
                found.append(text)
    return found


def text_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.JoinedStr):
        parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
        return "".join(map(str, parts))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def headings(page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^### `(.*)`$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("heading", headings("troubleshooting.md"))
def test_an_error_that_is_explained_is_one_that_is_raised(heading: str) -> None:
    pieces = [re.escape(piece) for piece in heading.split("…")]
    wanted = re.compile(".*".join(pieces), re.DOTALL)
    assert any(wanted.search(message) for message in messages())


def test_the_errors_of_own_files_and_chats_are_explained() -> None:
    """Where a person's own files are read, each message that is raised has a heading."""
    pieces = [heading.split("…") for heading in headings("troubleshooting.md")]
    explained = [re.compile(".*".join(map(re.escape, parts)), re.DOTALL) for parts in pieces]
    folder = ROOT / "minilora" / "summarization"
    others = ["predict.py", "flags.py", "commands.py", "settings.py", "hub.py"]
    others += [f"model/{name}.py" for name in ("start", "loading", "requirements")]
    for path in (*(folder / "data").glob("*.py"), *(folder / name for name in others)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.exc if isinstance(node, ast.Raise) else None
            if not isinstance(called, ast.Call) or not isinstance(called.func, ast.Name):
                continue
            text = text_of(called.args[0]) if called.args else None
            if text is not None and len(re.findall(r"\w{3,}", text)) > 1:
                assert any(wanted.search(text) for wanted in explained), (path.name, text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_flags_within_the_text_are_there(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for command in re.findall(r"`([^`\n]+)`", text):
        words = command.split()
        if words[0] == "make" and len(words) > 1:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        if words[0] == "python" and len(words) > 1 and words[1].endswith(".py"):
            assert (ROOT / words[1]).exists(), command
        if words[0].startswith("--") and page.stem in ("README", "recipes", "troubleshooting"):
            assert words[0].rstrip(":") in flags(), command


@functools.cache
def flags() -> set[str]:
    """Every flag of train.py, evaluate.py and the merge command."""
    from minilora import __main__
    from minilora.summarization.flags import evaluation_parser
    from minilora.summarization.settings import GROUPS, spelt

    names = {field.name for kind in GROUPS.values() for field in fields(kind)}
    commands = __main__._parser()._subparsers
    assert commands is not None
    merge = commands._group_actions[0].choices["merge"]  # type: ignore[index]
    parsers = (evaluation_parser(), merge)
    options = {option for parser in parsers for option in parser._option_string_actions}
    return options | {spelt(name) for name in names} | {"--preset"}


def test_the_readme_is_short_and_begins_with_code() -> None:
    lines = README.splitlines()
    assert len(lines) <= (144 if "<!-- study --><!-- end -->" in README else 150)
    assert lines.index("```python") < 40


def test_the_pages_show_the_figures_of_the_results() -> None:
    script = ROOT / "benchmarks" / "tables.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_counts_the_lines_of_the_core() -> None:
    assert reading.fill(README) == README


def test_a_count_leaves_out_docstrings_comments_and_blank_lines() -> None:
    source = '"""Words\n\nwords."""\n\n# words\nx = (\n    1,  # words\n)\n\n\ny = """a\nb"""\n'
    assert reading.lines_of_code(source) == 5


@pytest.mark.parametrize("page", [record.README, record.FIRST_RUN], ids=lambda page: page.stem)
def test_a_page_shows_its_part_of_the_recording(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    recording = record.RECORDING.read_text(encoding="utf-8")
    assert record.paste(text, recording) == text
    assert record.recorded(recording) == record.COMMANDS
    assert "fine-tuned" in text


def test_the_excerpt_leaves_all_dialogues_but_the_first_out() -> None:
    dialogues = "\n\n".join(f"[{i} of 9] id\n  dialogue" for i in (1, 2, 3))
    excerpt = record.excerpt(f"Recorded.\n$ train\n\n{dialogues}\n\ntable\n")
    assert "[1 of 9]" in excerpt
    assert "[2 of 9]" not in excerpt
    assert "2 more dialogues" in excerpt
    assert excerpt.startswith("$ train")
    assert excerpt.endswith("table")
