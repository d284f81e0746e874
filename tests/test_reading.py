"""What is read, what is refused and how: files and hub data sets to examples."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.summarization.data import reading
from minilora.summarization.data.reading import Example
from minilora.summarization.errors import UserError
from minilora.summarization.settings import DataOptions
from tests.helpers import EXPECTED, GOOD, OTHER, as_csv, as_json, as_jsonl, load, rows, write


def read(path: Path, **settings: Any) -> list[Example]:
    return reading.load_file(path, DataOptions(**settings))[0]


def refused(path: Path, *says: str, **settings: Any) -> str:
    """The file is refused in one printable line that names it."""
    with pytest.raises(UserError) as caught:
        reading.load_file(path, DataOptions(**settings))
    line = str(caught.value)
    assert str(path) in line
    assert line.isprintable()
    assert len(line) < len(str(path)) + 500
    for part in says:
        assert part in line
    return line


# Formats ------------------------------------------------------------------------------------------

LINES = as_jsonl([GOOD, OTHER])
LIST = as_json([GOOD, OTHER])
TABLE = as_csv([GOOD, OTHER])


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "list": ("a.json", LIST),
        "list, indented": ("a.json", json.dumps([GOOD, OTHER], indent=2).encode()),
        "list in a .jsonl": ("a.jsonl", b" \n" + LIST + b"\n\n"),
        "list, trailing comma": ("a.json", LIST[:-1] + b" , ]"),
        "lines": ("a.jsonl", LINES),
        "lines in a .json": ("a.json", LINES),
        "lines, no last newline": ("a.jsonl", LINES.rstrip()),
        "lines, blank ones between": ("a.jsonl", LINES.replace(b"}\n", b"}\n\n  \n")),
        "lines, windows": ("a.jsonl", LINES.replace(b"\n", b"\r\n")),
        "lines, old mac": ("a.jsonl", LINES.replace(b"\n", b"\r")),
        "lines, byte-order mark": ("a.jsonl", b"\xef\xbb\xbf" + LINES),
        "upper-case suffix": ("a.JSONL", LINES),
        "csv": ("a.csv", TABLE),
        "csv, all quoted": ("a.csv", as_csv([GOOD, OTHER], csv.QUOTE_ALL)),
        "csv, byte-order mark": ("a.csv", b"\xef\xbb\xbf" + TABLE),
        "csv, unix": ("a.csv", TABLE.replace(b"\r\n", b"\n")),
        "csv, old mac": ("a.csv", TABLE.replace(b"\r\n", b"\n").replace(b"\n", b"\r")),
        "csv, blank lines": ("a.csv", b"\n\n" + TABLE.replace(b"\r\n", b"\r\n\r\n")),
        "csv, spaces in the header": ("a.csv", b" id , dialogue, summary\n" + TABLE[21:]),
        "csv, columns without a name": (
            "a.csv",
            b"id,,dialogue,,summary\n"
            b'a-1,,"Ann: hi\nBob: hello",,They greet.\na-2,1,Cy: bye,2,Cy leaves.\n',
        ),
        "extra columns": ("a.json", as_json([GOOD | {"x": {"y": [None]}}, {"t": 1e999} | OTHER])),
        "deep, but not too deep": (
            "a.json",
            LIST[:-2] + b',"x":' + b"[" * 200 + b"]" * 200 + b"}]",
        ),
    }.values(),
)
def test_reads(tmp_path: Path, name: str, content: bytes) -> None:
    assert read(write(tmp_path / name, content)) == EXPECTED


def test_normalises_line_ends_and_outer_space(tmp_path: Path) -> None:
    row = {"dialogue": " \r\n A: x\r\nB: y\rC: z \n", "summary": "\ts\u2028t "}
    for name, content in (("a.json", as_json([row])), ("a.jsonl", as_jsonl([row]))):
        assert read(write(tmp_path / name, content)) == [
            Example("1", "A: x\nB: y\nC: z", "s\u2028t")
        ]
    assert read(write(tmp_path / "a.csv", as_csv([row]))) == [
        Example("2", "A: x\nB: y\nC: z", "s\u2028t")
    ]


def test_line_separators_of_unicode_end_no_row(tmp_path: Path) -> None:
    row = GOOD | {"dialogue": "A: \u2028 \x85 \x0b \x0c \x1c b"}
    content = json.dumps(row, ensure_ascii=False).replace("\x0b", "\\u000b")
    content = content.replace("\x0c", "\\f").replace("\x1c", "\\u001c")
    assert read(write(tmp_path / "a.jsonl", content.encode()))[0].dialogue == row["dialogue"]
    assert read(write(tmp_path / "a.csv", as_csv([row])))[0].dialogue == row["dialogue"]


def test_names_of_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", as_json([{"text": "A: b", "tldr": "c"}]))
    assert read(path, dialogue_column="text", summary_column="tldr") == [Example("1", "A: b", "c")]
    refused(path, "row 1", "'summary'", "text, tldr", "--dialogue-column", "--summary-column")
    refused(path, "row 1", "'chat'", "text, tldr", dialogue_column="chat", summary_column="tldr")


def test_ids(tmp_path: Path) -> None:
    """All become text, what is missing the row's number; a duplicate is no fault."""
    ids = [7, "x", "x", None, "", 1.5, {"$oid": "5f"}, ["a"]]
    path = write(tmp_path / "a.json", as_json([GOOD | {"id": i} for i in ids]))
    wanted = ["7", "x", "x", "4", "5", "1.5", "{'$oid': '5f'}", "['a']"]
    assert [example.id for example in read(path)] == wanted


def test_five_megabytes_in_a_line(tmp_path: Path) -> None:
    row = GOOD | {"dialogue": "A: é" + "word " * 1_000_000 + "end"}
    for name, content in (
        ("a.json", as_json([row])),
        ("a.jsonl", as_jsonl([row])),
        ("a.csv", as_csv([row])),
    ):
        assert read(write(tmp_path / name, content)) == [Example(**row)]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                name: st.text(
                    st.characters(exclude_categories=["Cs"], exclude_characters="\0")
                ).map(lambda text: "x" + text + "x")
                for name in ("id", "dialogue", "summary")
            }
        ),
        min_size=1,
        max_size=5,
    )
)
def test_every_format_reads_the_same(tmp_path_factory: Any, rows: list[dict[str, str]]) -> None:
    folder = tmp_path_factory.mktemp("formats")
    list_ = read(write(folder / "a.json", json.dumps(rows, ensure_ascii=False).encode()))
    assert read(write(folder / "a.jsonl", as_jsonl(rows))) == list_
    assert read(write(folder / "a.csv", as_csv(rows, csv.QUOTE_ALL))) == list_
    wanted = [row["dialogue"].replace("\r\n", "\n").replace("\r", "\n") for row in rows]
    assert [example.dialogue for example in list_] == wanted


# Files that are refused ---------------------------------------------------------------------------


def bad_values() -> dict[str, tuple[Any, str]]:
    return {
        "null": (None, "null"),
        "integer": (3, "int"),
        "fraction": (0.5, "float"),
        "infinite": (float("inf"), "float"),
        "boolean": (True, "bool"),
        "list": ([["a"]], "list"),
        "object": ({"a": "b"}, "dict"),
        "NUL": ("a\0b", "NUL"),
        "high surrogate": ("a\ud83d", r"'\ud83d'"),
        "low surrogate": ("\ude00 b", r"'\ude00'"),
        "surrogates in the wrong order": ("\ude00\ud83d", "surrogate"),
        "empty": ("", "empty"),
        "only space": (" \r\n\t\u00a0\u2028", "empty"),
    }


@pytest.mark.parametrize("column", ["dialogue", "summary"])
@pytest.mark.parametrize(("value", "says"), bad_values().values(), ids=bad_values())
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_bad_values(tmp_path: Path, name: str, value: Any, says: str, column: str) -> None:
    bad = GOOD | {"id": 77, column: value}
    content = (
        as_json([GOOD, bad, OTHER, bad]) if name == "a.json" else as_jsonl([GOOD, bad, OTHER, bad])
    )
    path = write(tmp_path / name, content)
    place = "row 2" if name == "a.json" else "line 2"
    refused(path, f"{place} (id 77): ", column, says, "of 2 bad rows", "--skip-bad-rows")
    examples, notices = reading.load_file(path, DataOptions(skip_bad_rows=True))
    assert examples == EXPECTED
    assert len(notices) == 2
    assert all(f"{column}" in notice and "left out" in notice for notice in notices)


@pytest.mark.parametrize("row", [None, 1, "text", [], ["a", "b"], {}, {"dialogue": "a"}, True])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_rows_that_are_none(tmp_path: Path, name: str, row: Any) -> None:
    encode = as_json if name == "a.json" else as_jsonl
    refused(write(tmp_path / name, encode([GOOD, row])), "2: ")


BAD_ID = ["\ud800", "a\0"]


@pytest.mark.parametrize("identity", BAD_ID, ids=ascii)
def test_bad_ids(tmp_path: Path, identity: Any) -> None:
    refused(write(tmp_path / "a.json", as_json([GOOD | {"id": identity}])), "row 1", "'id'")


BROKEN: dict[str, tuple[str, bytes, str]] = {
    # nothing there
    "no bytes": ("a.json", b"", "no rows"),
    "no bytes, jsonl": ("a.jsonl", b"", "no rows"),
    "no bytes, csv": ("a.csv", b"", "no rows"),
    "only a mark": ("a.jsonl", b"\xef\xbb\xbf", "no rows"),
    "blank lines": ("a.jsonl", b"\n \r\n\n", "no rows"),
    "blank lines, csv": ("a.csv", b"\n\r\n\n", "no rows"),
    "empty list": ("a.json", b"[ \n ]", "no rows"),
    "header only": ("a.csv", b"id,dialogue,summary\n", "no rows"),
    # encodings
    "latin-1": (
        "a.jsonl",
        LINES + '{"dialogue": "é"}'.encode("latin-1"),
        "line 3: not UTF-8 (byte 0xe9",
    ),
    "latin-1, csv": (
        "a.csv",
        "dialogue,summary\na,b\nc,ü\n".encode("latin-1"),
        "line 3: not UTF-8",
    ),
    "latin-1, list": (
        "a.json",
        '[{"dialogue": "a",\n"summary": "ß"}]'.encode("latin-1"),
        "line 2: not",
    ),
    "windows-1252": ("a.jsonl", b'{"dialogue": "\x93hi\x94", "summary": "x"}', "line 1: not UTF-8"),
    "shift-jis": ("a.jsonl", '{"dialogue": "こんにちは"}'.encode("shift-jis"), "at offset 14"),
    "gbk": ("a.csv", "dialogue,summary\n你好,再见\n".encode("gbk"), "line 2: not UTF-8"),
    "utf-16": ("a.json", LIST.decode().encode("utf-16"), "byte 0xff at offset 0"),
    "utf-16, big-endian": ("a.json", b"\xfe\xff" + LIST.decode().encode("utf-16-be"), "byte 0xfe"),
    "utf-16, no mark": ("a.json", LIST.decode().encode("utf-16-le"), "row 1: not JSON"),
    "utf-16, no mark, jsonl": ("a.jsonl", LINES.decode().encode("utf-16-le"), "line 1: not JSON"),
    "utf-16, no mark, csv": ("a.csv", TABLE.decode().encode("utf-16-le"), "line 1 holds a NUL"),
    "utf-32": ("a.json", LIST.decode().encode("utf-32"), "not UTF-8"),
    "surrogates as bytes": (
        "a.jsonl",
        b'{"dialogue": "\xed\xa0\xbd\xed\xb8\x80"}',
        "line 1: not UTF-8",
    ),
    "overlong": ("a.jsonl", b'{"dialogue": "\xc0\xaf"}', "line 1: not UTF-8"),
    "cut inside a character": (
        "a.jsonl",
        LINES + '{"dialogue": "é'.encode()[:-1],
        "line 3: not UTF-8",
    ),
    "two marks": ("a.jsonl", b"\xef\xbb\xbf\xef\xbb\xbf" + LINES, "line 1: not JSON"),
    "a mark inside": ("a.jsonl", LINES + b"\xef\xbb\xbf" + LINES, "line 3: not JSON"),
    "gzip": ("a.json", b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "damaged or cut off"),
    # nesting and size
    "deep list": ("a.json", b"[" * 100_000, "row 1: not JSON (nested too deeply)"),
    "deep list, closed": ("a.json", b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "deep object": ("a.json", b'{"a":' * 100_000, "line 1: not JSON (nested too deeply)"),
    "deep in row 3": ("a.json", LIST[:-1] + b"," + b'[{"a":' * 50_000, "row 3: not JSON (nested"),
    "deep, jsonl": ("a.jsonl", LINES + b"[" * 100_000, "line 3: not JSON (nested too deeply)"),
    "deep in an extra column": (
        "a.jsonl",
        LINES + b'{"x": ' + b"[" * 99_999 + b"]" * 99_999 + b"}",
        "line 3: not JSON (nested",
    ),
    "an endless number": (
        "a.json",
        LIST[:-1] + b"," + b"9" * 5000 + b"]",
        "row 3: not JSON (Exceeds",
    ),
    "an endless number, jsonl": (
        "a.jsonl",
        b'{"id": ' + b"9" * 5000 + b"}",
        "line 1: not JSON (Exceeds",
    ),
    "5 MB, not closed": (
        "a.json",
        b'[{"dialogue": "' + b"word " * 1_000_000,
        "row 1: not JSON (Unterm",
    ),
    "5 MB, jsonl, not closed": (
        "a.jsonl",
        b'{"dialogue": "' + b"word " * 1_000_000,
        "line 1: not JSON",
    ),
    "5 MB, csv, not closed": (
        "a.csv",
        b'dialogue,summary\na,"' + b"word " * 1_000_000,
        "line 2: not CSV",
    ),
    "5 MB of a column's name": (
        "a.json",
        b'[{"' + b"word " * 1_000_000 + b'": 1}]',
        "row 1: no column",
    ),
    "5 MB of an id": ("a.json", as_json([{"id": "i" * 5_000_000}]), "row 1 (id iiiii"),
    # syntax
    "html": ("a.json", b"<!DOCTYPE html>\n<html>\n</html>", "line 1: not JSON"),
    "lfs pointer": (
        "a.json",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "line 1",
    ),
    "python": ("a.json", b"[{'dialogue': 'a'}]", "row 1: not JSON (Expecting property name"),
    "no comma": ("a.json", LIST[:-1] + LIST[1:], "row 2: no comma"),
    "two commas": ("a.json", b"[" + LIST[1:-1] + b",,{}]", "row 3: not JSON"),
    "text after": ("a.json", LIST + LIST, "row 2: the list ends here"),
    "NaN": ("a.json", b'[{"dialogue": NaN, "summary": "x"}]', "row 1: column 'dialogue' is float"),
    "a control character": (
        "a.jsonl",
        b'{"dialogue": "a\x01"}',
        "line 1: not JSON (Invalid control",
    ),
    "a bad escape": ("a.jsonl", b'{"dialogue": "\\x41"}', "line 1: not JSON (Invalid \\\\escape"),
    "a line break in text": (
        "a.jsonl",
        b'{"dialogue": "a\nb", "summary": "c"}',
        "line 1: not JSON",
    ),
    "two objects in a line": (
        "a.jsonl",
        b'{"dialogue": "a"}{"dialogue": "b"}',
        "line 1: not JSON (Extra",
    ),
    "a column twice": (
        "a.json",
        b'[{"dialogue": "a", "summary": "b", "dialogue": "c"}]',
        "row 1: column 'dialogue' occurs twice",
    ),
    "columns of lists": (
        "a.json",
        as_json({"dialogue": ["a"], "summary": ["b"]}),
        "list, not text",
    ),
    "wrapped, cut off": ("a.json", as_json({"data": [GOOD]})[:-1], "row 1: the list ends here"),
    "a lone text": ("a.json", b'"dialogue"', "line 1: expected an object with columns, found str"),
    # csv
    "no header": ("a.csv", b"Ann: hi,They greet.\nBob: x,y\n", "line 2: no column 'dialogue'"),
    "a semicolon too many": ("a.csv", b"dialogue;summary\na;b;c\n", "text with ';' or line"),
    "a tab too many": ("a.tsv", b"dialogue\tsummary\na\tb\tc\n", r"text with '\t' or line"),
    "a field too many": ("a.csv", b"dialogue,summary\na,b\nhi, there,c\n", "line 3: 3 fields"),
    "a field too few": ("a.csv", b'dialogue,summary\n"a\nb",c\nd\n', "line 4: 1 field where"),
    "header twice": (
        "a.csv",
        b"dialogue,dialogue,summary\na,b,c\n",
        "line 2: column 'dialogue' occurs twice",
    ),
    "quote never closed": (
        "a.csv",
        b'dialogue,summary\na,b\n"c,d\ne,f\n',
        "line 3: not CSV (unexp",
    ),
    "text after a quote": ("a.csv", b'dialogue,summary\n"a" b,c\n', "line 2: not CSV"),
    "quotes not doubled": ("a.csv", b'dialogue,summary\n"he said "hi"",c\n', "line 2: not CSV"),
    "backslash quotes": ("a.csv", b'dialogue,summary\n"he said \\"hi\\"",c\n', "line 2: not CSV"),
    "NUL in csv": ("a.csv", b"dialogue,summary\na\0,b\n", "line 2 holds a NUL"),
    "empty field": ("a.csv", b"dialogue,summary\na,b\nc,\n", "line 3: empty summary"),
    "json in csv": ("a.csv", LINES, "line 2: no column 'dialogue'"),
    "csv in json": ("a.json", TABLE, "line 1: not JSON"),
    "other suffix": ("a.txt", LINES, "must end in .jsonl, .json, .csv"),
    "no suffix": ("a", LINES, "must end in"),
}


@pytest.mark.parametrize(("name", "content", "says"), BROKEN.values(), ids=BROKEN)
def test_broken_files(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    refused(write(tmp_path / name, content), says.replace("\\\\", "\\"))


def outcome(path: Path) -> list[Example] | None:
    """The examples, or None where the file is refused in one line."""
    try:
        return read(path)
    except UserError:
        refused(path)
        return None


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", LIST), ("a.jsonl", LINES), ("a.csv", TABLE)]
)
def test_cut_off_anywhere(tmp_path: Path, name: str, content: bytes) -> None:
    """A list that lost its end is always refused; a table or lines lose at most the last row."""
    for length in range(len(content)):
        found = outcome(write(tmp_path / name, content[:length]))
        if name == "a.json":
            assert found is None
        elif found is not None:
            assert found[0] == EXPECTED[0] or (name == "a.csv" and len(found) == 1)
            assert len(found) == 2 or b"a-2" not in content[:length]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([("a.json", LIST), ("a.jsonl", LINES), ("a.csv", TABLE)]),
    st.lists(
        st.tuples(st.floats(0, 1), st.binary(max_size=3), st.booleans()), min_size=1, max_size=3
    ),
)
def test_damage_anywhere(tmp_path_factory: Any, file: tuple[str, bytes], edits: list[Any]) -> None:
    """Whatever a few wrong bytes do: a line that says what is wrong, or the rows there are."""
    name, content = file
    for where, new, insert in edits:
        position = int(where * len(content))
        content = content[:position] + new + content[position + (0 if insert else len(new)) :]
    found = outcome(write(tmp_path_factory.mktemp("damage") / name, content))
    assert found is None or len(found) >= 1


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    refused(tmp_path / "a.json", "no such file or directory")
    write(tmp_path / "train.json", LIST)
    refused(tmp_path / "trian.json", f"(but there is {tmp_path / 'train.json'})")
    (tmp_path / "folder.json").mkdir()
    refused(tmp_path / "folder.json", "cannot be read (Is a directory)")
    (tmp_path / "link.json").symlink_to(tmp_path / "nothing")
    refused(tmp_path / "link.json", f"no such file: it is a link to {tmp_path / 'nothing'}")


def test_skipping_is_counted_never_silent(tmp_path: Path) -> None:
    bad = [GOOD | {"id": i, "summary": ""} for i in range(20)]
    path = write(tmp_path / "a.jsonl", as_jsonl([GOOD, *bad]) + b"{broken\n")
    refused(path, "line 2 (id 0): empty summary (the first of 21 bad rows)")
    examples, notices = reading.load_file(path, DataOptions(skip_bad_rows=True))
    assert examples == EXPECTED[:1]
    assert len(notices) == 6
    assert "16 more bad rows left out" in notices[-1]
    refused(write(tmp_path / "b.jsonl", as_jsonl(bad)), "no rows left", "id 0", skip_bad_rows=True)


def test_every_row_is_given_back_or_named(tmp_path: Path) -> None:
    """At random: as many examples and left-out rows as there were rows."""
    generator, bad = random.Random(0), [value for value, _ in bad_values().values()]
    for case in range(30):
        content = [dict(row) for row in rows(30)]
        for row in generator.sample(content, case % 5):
            row[generator.choice(["dialogue", "summary"])] = generator.choice(bad)
        path = write(tmp_path / "a.json", as_json(content))
        examples, notices = reading.load_file(path, DataOptions(skip_bad_rows=True))
        assert len(examples) + len(notices) == 30
        assert len(notices) == case % 5


# The hub ------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that stands for the hub set owner/name."""
    original, folder = datasets.load_dataset, tmp_path / "hub"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name: original(str(folder), cache_dir=str(tmp_path / "cache")),
    )
    return folder


def test_hub(hub: Path) -> None:
    # A dialogue of knkarthick/samsum is null; older copies of the set have an empty one.
    bad = [GOOD | {"dialogue": ""}, GOOD | {"id": "n", "dialogue": None}]
    write(hub / "train.jsonl", as_jsonl([*rows(9), *bad]))
    write(hub / "validation.jsonl", as_jsonl(rows(3, 10)))
    found, notices = load("owner/name")
    assert [len(examples) for examples in found.values()] == [9, 3, 3]
    assert "owner/name train row 10 (id a-1): empty dialogue, left out" in notices
    assert "owner/name train row 11 (id n): empty dialogue, left out" in notices
    with pytest.raises(
        UserError, match=r"owner/name train row 1 \(id r0\): no column 'text'.*found: id"
    ):
        load("owner/name", dialogue_column="text")


def test_hub_without_splits(hub: Path) -> None:
    write(hub / "test.jsonl", as_jsonl(rows(3)))
    with pytest.raises(UserError, match=r"owner/name: no train data; found: owner/name test"):
        load("owner/name")


def test_hub_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("Couldn't reach\nthe hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    (tmp_path / "samsum").mkdir()
    line = (
        r"samsun: no such file .*\(but there is samsum\), and .* \(OSError: Couldn't reach the hub"
    )
    with pytest.raises(UserError, match=line):
        load("samsun")


def test_hub_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"nosuch/thing: no such file.*, and offline it is not in"):
        load("nosuch/thing")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nothing.json",
        "./nothing",
        "/no/thing",
        "../nothing",
        "a/b/c",
        "~/x/y/z",
        "~nobody/x",
        "folder/nothing",
        "a b",
        "a\0b",
        "x" * 5000 + "/" + "y" * 5000,
        "C:\\data",
    ],
)
def test_paths_are_not_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda name: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError):
        load(name)
