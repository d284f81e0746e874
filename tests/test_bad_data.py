"""Thirty files and more of each kind of bad data: one line with file and row, or every row read.

The files are drawn at random, from a seed. What each must come to is known where it is made: the
place of the first bad row, or the examples that a reader must find.
"""

import csv
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minilora.summarization.cli import train_main
from minilora.summarization.data import reading
from minilora.summarization.errors import UserError
from minilora.summarization.settings import DataOptions
from tests.helpers import SMALL, as_csv, as_json, as_jsonl, save_bart, save_data, write

COUNT = 30
Row = dict[str, Any]


@dataclass
class Case:
    """A file, and what must come of it."""

    name: str
    content: bytes
    bad: str | None = None
    """The place that the error names ("row 3", "line 4"); "" for an error about the whole file."""
    rows: int = 0
    """How many examples there are otherwise."""


WORDS = ("hi", "Ann", "naïve", "日本", "😂", "a,b", '"so"', "it's", "; x", "\\n", "</s>", "مرحبا")


def good(draw: random.Random, count: int) -> list[Row]:
    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 12))) + " end"

    return [{"id": f"r{i}", "dialogue": f"A: {text()}", "summary": text()} for i in range(count)]


def table(draw: random.Random, rows: list[Row]) -> tuple[str, bytes, str, int]:
    """The rows in one of the formats: name, content, what places are called, the first's number."""
    if draw.random() < 0.5:
        return "a.json", as_json(rows), "row", 1
    return "a.jsonl", as_jsonl(rows), "line", 1


def spoil(draw: random.Random, change: Callable[[Row], Row]) -> Case:
    """Good rows with a bad one somewhere among them."""
    rows = good(draw, draw.randint(1, 8))
    at = draw.randrange(len(rows))
    rows[at] = change(dict(rows[at]))
    name, content, kind, first = table(draw, rows)
    return Case(name, content, f"{kind} {at + first}")


def encodings(draw: random.Random) -> Case:
    """Not UTF-8 from some line on."""
    encoding, text = draw.choice(
        [
            ("latin-1", "é"),
            ("cp1252", "“x”"),
            ("shift-jis", "日本"),
            ("gbk", "你好"),
            ("koi8-r", "да"),
        ]
    )
    rows = good(draw, draw.randint(1, 6))
    lines = [json.dumps(row).encode() for row in rows]
    at = draw.randrange(len(rows))
    lines[at] = json.dumps(rows[at] | {"summary": text}, ensure_ascii=False).encode(
        encoding, "replace"
    )
    return Case("a.jsonl", b"\n".join(lines), f"line {at + 1}")


def marks(draw: random.Random) -> Case:
    """UTF-16 and UTF-32, which no line can be named for, and a byte-order mark, which is fine."""
    rows = good(draw, 3)
    if draw.random() < 0.5:
        name, content, _, _ = table(draw, rows)
        return Case(name, b"\xef\xbb\xbf" + content, rows=3)
    return Case("a.json", as_json(rows).decode().encode(draw.choice(["utf-16", "utf-32"])), "")


def surrogates(draw: random.Random) -> Case:
    alone = chr(draw.randrange(0xD800, 0xE000))
    column = draw.choice(["dialogue", "summary", "id"])
    return spoil(draw, lambda row: row | {column: f"a{alone}b"})


def pairs_of_surrogates(draw: random.Random) -> Case:
    """Spelt as JSON spells what lies beyond 16 bits: fine."""
    rows = good(draw, 3)
    rows[1]["dialogue"] += chr(draw.randrange(0x10000, 0x20000))
    return Case("a.jsonl", as_jsonl(rows), rows=3)


def nesting(draw: random.Random) -> Case:
    rows = good(draw, draw.randint(1, 5))
    at, depth = draw.randrange(len(rows)), draw.choice([20_000, 50_000, 100_000])
    opening, closing = draw.choice([("[", "]"), ('{"a":', "}")])
    deep = opening * depth + ("1" + closing * depth if draw.random() < 0.5 else "")
    lines = [json.dumps(row) for row in rows]
    lines[at] = f'{{"dialogue": {deep}' + ("}" if deep.endswith(closing) else "")
    return Case("a.jsonl", "\n".join(lines).encode(), f"line {at + 1}")


def shallow_nesting(draw: random.Random) -> Case:
    """A dialogue that is an object, or a list of anything but turns, is no text."""
    value: Any = draw.choice([["a", 1], {"text": "a"}, [], {}, [["a"]], [{"speaker": "A"}]])
    return spoil(draw, lambda row: row | {draw.choice(["dialogue", "summary"]): value})


def long_line(draw: random.Random) -> Case:
    """Five megabytes in one line: read whole, or refused where it does not end."""
    word = draw.choice(["word ", "日本 ", "a"])
    row = {"dialogue": "A: " + word * (5_000_000 // len(word.encode())), "summary": "s"}
    content = json.dumps(row, ensure_ascii=False).encode()
    if draw.random() < 0.5:
        return Case("a.jsonl", content, rows=1)
    return Case("a.jsonl", as_jsonl(good(draw, 2)) + content[: -draw.randint(3, 1000)], "line 3")


def missing_columns(draw: random.Random) -> Case:
    column = draw.choice(["dialogue", "summary"])

    def without(row: Row) -> Row:
        value = row.pop(column)
        if draw.random() < 0.5:
            row[draw.choice(["Chat", "txt", "sumary", "dialog", ""])] = value
        return row

    return spoil(draw, without)


def extra_columns(draw: random.Random) -> Case:
    """Whatever they hold they are nobody's business."""
    values = [None, 3, [1, [2]], {"a": None}, "", "x" * 1000, True, 1e300]
    rows = [row | {f"x{i}": draw.choice(values) for i in range(3)} for row in good(draw, 4)]
    name, content, _, _ = table(draw, rows)
    return Case(name, content, rows=4)


def nulls(draw: random.Random) -> Case:
    column = draw.choice(["dialogue", "summary"])
    if draw.random() < 0.3:
        return spoil(draw, lambda row: row | {column: f"a\0{draw.random()}"})
    return spoil(draw, lambda row: row | {column: None})


def numbers(draw: random.Random) -> Case:
    value = draw.choice([0, 1, -3.5, 1e300, True, False, 10**30, float("nan"), float("inf")])
    return spoil(draw, lambda row: row | {draw.choice(["dialogue", "summary"]): value})


def empty(draw: random.Random) -> Case:
    """A split without a row, however it is spelt."""
    space = "".join(draw.choices(" \n\r\t", k=draw.randint(0, 9)))
    name, text = draw.choice(
        [
            ("a.json", space),
            ("a.jsonl", space),
            ("a.json", f"{space}[{space}]{space}"),
            ("a.jsonl", "\ufeff" + space),
            ("a.csv", "id,dialogue,summary\n" + "\n" * draw.randint(0, 5)),
            ("a.csv", "\n" * draw.randint(0, 5)),
        ]
    )
    return Case(name, text.encode(), "")


def empty_texts(draw: random.Random) -> Case:
    value = "".join(draw.choices(" \n\t\u00a0\u2003\u3000", k=draw.randint(0, 5)))
    return spoil(draw, lambda row: row | {draw.choice(["dialogue", "summary"]): value})


def quoting(draw: random.Random) -> Case:
    """CSV in any of its dialects that Python knows as one: read in full."""
    rows = good(draw, 4)
    for row in rows:
        row["dialogue"] += draw.choice(["\nB: x, y", '\n"B": "z"', "", ",", '"', "\r\n"]) + "."
    content = as_csv(rows, draw.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC]))
    ends = draw.choice([b"\r\n", b"\n"])
    return Case("a.csv", content.replace(b"\r\n", ends), rows=4)


def bad_quoting(draw: random.Random) -> Case:
    """A quote that is not closed, is not doubled, or a comma that is not quoted."""
    rows, at = good(draw, 5), draw.randrange(5)
    lines = []
    for i, row in enumerate(rows):
        text = io.StringIO()
        csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="").writerow(row.values())
        lines.append(text.getvalue())
        if i == at:
            lines[-1] = draw.choice(
                ['r,"A: never closed, s', 'r,"A: "so" he said",s', "r,A: x, y, z,s", "r,A: x"]
            )
    return Case("a.csv", "\n".join(["id,dialogue,summary", *lines]).encode(), f"line {at + 2}")


def truncation(draw: random.Random) -> Case:
    """Cut off in the middle of a row. (Between two rows, nobody can tell.)"""
    rows = good(draw, draw.randint(2, 6))
    at = draw.randrange(1, len(rows))
    whole = [json.dumps(row).encode() for row in rows[: at + 1]]
    whole[-1] = whole[-1][: draw.randrange(1, len(whole[-1]))]
    if draw.random() < 0.5:
        return Case("a.jsonl", b"\n".join(whole), f"line {at + 1}")
    return Case("a.json", b"[" + b", ".join(whole), f"row {at + 1}")


KINDS = [
    encodings, marks, surrogates, pairs_of_surrogates, nesting, shallow_nesting, long_line,
    missing_columns, extra_columns, nulls, numbers, empty, empty_texts, quoting, bad_quoting,
    truncation,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_thirty_files_of_a_kind(tmp_path: Path, kind: Callable[[random.Random], Case]) -> None:
    draw = random.Random(kind.__name__)
    seen = set()
    for _ in range(COUNT):
        case = kind(draw)
        seen.add(case.content)
        path = write(tmp_path / case.name, case.content)
        try:
            found, notices = reading.load_file(path, DataOptions())
        except UserError as error:
            line = str(error)
            assert case.bad is not None, line
            assert line.startswith(f"{path} {case.bad}" if case.bad else f"{path}"), case
            assert line.isprintable()
            assert len(line) < len(str(path)) + 500
        else:
            assert case.bad is None, case.content[:200]
            assert (len(found), notices) == (case.rows, [])
    assert len(seen) > (COUNT * 0.9 if kind not in (empty, long_line) else 5)


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bart(tmp_path_factory.mktemp("bad-data") / "bart")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_from_the_command_line_it_is_one_line_or_a_run(
    bart: Path, tmp_path: Path, capfd: Any, kind: Callable[[random.Random], Case]
) -> None:
    """The file is the training split; a run of one step, or exit code 2 and nothing written."""
    case = kind(random.Random(f"train {kind.__name__}"))
    if len(case.content) > 1_000_000:
        pytest.skip("tokenizing five megabytes takes seconds; it was read above")
    data = save_data(tmp_path / "data")
    (data / "train.jsonl").unlink()
    write((data / "train").with_suffix(Path(case.name).suffix), case.content)
    run = tmp_path / "run"
    argv = ["--model", str(bart), "--data", str(data), *SMALL, "--max-steps", "1", "--no-evaluate"]
    code = train_main([*argv, "--output", str(run)])
    said = capfd.readouterr().err
    if case.bad is None:
        assert code == 0
        assert (run / "adapter" / "adapter_config.json").exists()
    elif code == 0:  # an empty dialogue in training is left out, and said
        assert kind in (empty_texts, nulls)
        assert "left out" in said
    else:
        assert code == 2
        assert said.count("\n") == 1
        assert said.startswith(f"train.py: {data / 'train'}")
        assert not run.exists()
