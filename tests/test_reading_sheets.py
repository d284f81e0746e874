"""The blind reading's sheets: drawn alike, unmarked, read back whole, counted if both say so."""

import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from typing import Any

import pytest

from tests.forks import run_script

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def reading() -> ModuleType:
    """The script; it imports `common` beside it by its bare name."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("reading_sheets", FOLDER / "reading.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    rows = [
        {
            "id": f"te-{i}",
            "dialogue": f"Anna: chat {i}\nTom: yes",
            "reference": f"Reference text {i}.",
            "base": f"Before text {i}.",
            "finetuned": f"After\ntext {i}.",
            "rouge1_base": 1.0,
        }
        for i in range(150)
    ]
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"data": "minichat", "split": "test", "examples": rows}))
    return path


def fill(reading: ModuleType, chosen: list[Any], path: Path, judge: Any) -> Path:
    """A sheet as a reader fills it who knows whose a summary is: `judge` says what of it."""
    lines = [
        f"{number}.{letter} {judge(side, number)}\n"
        for number, row in enumerate(chosen, 1)
        for letter, side in zip(reading.LETTERS, row["sides"], strict=True)
    ]
    path.write_text("".join(lines))
    return path


def test_the_draw_is_of_the_seed_and_shuffled(reading: ModuleType, evaluation: Path) -> None:
    chosen = reading.draw(evaluation, 100, 0)
    assert chosen == reading.draw(evaluation, 100, 0)
    assert chosen != reading.draw(evaluation, 100, 1)
    assert len({row["id"] for row in chosen}) == 100
    assert all(sorted(row["sides"]) == sorted(reading.SIDES) for row in chosen)
    # Each side stands under each letter about 33 times: 15 is 4 standard deviations away.
    for place in range(3):
        under = [row["sides"][place] for row in chosen]
        assert all(under.count(side) > 15 for side in reading.SIDES)
    assert len(reading.draw(evaluation, 500, 0)) == 150


def test_the_sheet_tells_all_but_whose_it_is(
    reading: ModuleType, evaluation: Path, tmp_path: Path
) -> None:
    chosen = reading.draw(evaluation, 3, 0)
    reading.write_sheet(chosen, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "answers.txt",
        "instructions.md",
        "sheet.md",
    ]
    text = (tmp_path / "out" / "sheet.md").read_text()
    for number, row in enumerate(chosen, 1):
        assert f"## {number}\n\n> Anna: chat" in text
        for letter, side in zip("ABC", row["sides"], strict=True):
            assert f"- **{number}.{letter}** {' '.join(row[side].split())}\n" in text
    for word in ("base", "finetuned", "fine-tuned", "reference", "te-"):
        assert word not in text.replace("Reference text", "")  # the fixture's own text
        assert word not in (tmp_path / "out" / "instructions.md").read_text()
    first, *lines = (tmp_path / "out" / "answers.txt").read_text().splitlines()
    assert first == f"# sheet {reading.digest(chosen)}"
    assert lines == [f"{n}.{letter}" for n in (1, 2, 3) for letter in "ABC"]


def test_counts_only_what_both_say(reading: ModuleType, evaluation: Path, tmp_path: Path) -> None:
    chosen = reading.draw(evaluation, 100, 0)

    def one(side: str, number: int) -> str:
        if side == "finetuned":
            return "y all" if number <= 60 else "n part"
        return "y all" if side == "reference" else "n no"

    def other(side: str, number: int) -> str:
        if side == "finetuned":
            return "y all" if number <= 50 else "y part" if number <= 80 else "n no"
        return "y all" if side == "reference" and number > 5 else "n no"

    files = [
        fill(reading, chosen, tmp_path / "1", one),
        fill(reading, chosen, tmp_path / "2", other),
    ]
    first, second = (reading.read_answers(path, 100) for path in files)
    found = reading.count(chosen, first, second)
    assert found["results"] == {
        "base": {"readable": 0, "right": 0, "right_or_in_part": 0},
        "finetuned": {"readable": 60, "right": 50, "right_or_in_part": 80},
        "reference": {"readable": 95, "right": 95, "right_or_in_part": 95},
    }
    assert found["of_each_reader"][0]["finetuned"]["right"] == 60
    assert found["of_each_reader"][1]["finetuned"] == {
        "readable": 80,
        "right": 50,
        "right_or_in_part": 80,
    }
    assert found["void"] is False
    # readable: they differ on fine-tuned 61 to 80 and on references 1 to 5
    assert found["agreement"]["readable"]["agreed"] == pytest.approx(275 / 300)
    assert found["agreement"]["right"]["agreed"] == pytest.approx((300 - 10 - 20 - 5) / 300)
    row = found["answers"][0]
    assert row["id"] == chosen[0]["id"]
    assert row["finetuned"] == ["y all", "y all"]
    assert row["reference"] == ["y all", "n no"]


@pytest.mark.parametrize(("wrong", "void"), [(10, False), (11, True)])
def test_void_below_nine_in_ten_references(
    reading: ModuleType, evaluation: Path, tmp_path: Path, wrong: int, void: bool
) -> None:
    """In part is not right: 90 of 100 references must be right in all, by both readers."""
    chosen = reading.draw(evaluation, 100, 0)
    good = fill(reading, chosen, tmp_path / "1", lambda side, number: "y all")
    poor = fill(
        reading,
        chosen,
        tmp_path / "2",
        lambda side, n: "y part" if side == "reference" and n <= wrong else "y all",
    )
    answers = [reading.read_answers(path, 100) for path in (good, poor)]
    assert reading.count(chosen, *answers)["void"] is void


def test_kappa_is_cohens(reading: ModuleType) -> None:
    """The example of 20 yes, 5 and 10 apart, 15 no: observed 0.7, by chance 0.5, so 0.4."""
    first = ["y"] * 25 + ["n"] * 25
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert reading.kappa(first, second) == pytest.approx(0.4)
    assert reading.kappa(first, first) == pytest.approx(1.0)
    assert reading.kappa("yyyy", "yyyy") is None
    generator = random.Random(0)
    one, two = ([generator.choice(["all", "part", "no"]) for _ in range(20_000)] for _ in "12")
    assert reading.kappa(one, two) == pytest.approx(0.0, abs=0.03)  # 4 standard deviations


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.A y all\n1.B y all\n", "1 answers are missing, first 1.C"),
        ("1.A y all\n1.B\n1.C n no\n", r"line 2: '1.B' is not like '1.A y part'"),
        ("1.A y all\n1.A y all\n", "line 2: 1.A is answered a second time"),
        ("2.A y all\n", "line 1: the sheet has no 2, only 1 to 1"),
        ("1.A y maybe\n", "line 1: '1.A y maybe' is not like"),
        ("1.D y all\n", "line 1"),
    ],
)
def test_a_sheet_badly_filled(reading: ModuleType, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "answers.txt"
    path.write_text(text)
    with pytest.raises(reading.SheetError, match=message):
        reading.read_answers(path, 1)


def test_what_a_language_model_may_write_around(reading: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "answers.txt"
    path.write_text("# answers\n```\n- 1.a Yes, ALL\n\n| 1.B | n | no |\n1.C\ty\tpart \n```\n")
    assert reading.read_answers(path, 1) == {
        (1, "A"): (True, "all"),
        (1, "B"): (False, "no"),
        (1, "C"): (True, "part"),
    }


def test_from_the_command_line(evaluation: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> CompletedProcess[str]:
        return run_script(FOLDER / "reading.py", *arguments)

    assert run("sheet", evaluation, "--out", tmp_path / "out", "--count", 2).returncode == 0
    blank, filled = tmp_path / "out" / "answers.txt", tmp_path / "filled.txt"
    filled.write_text(re.sub(r"(\d\.[ABC])", r"\1 y all", blank.read_text()))
    given = ("--readers", "a", "b", "--count", 2)
    for arguments, message in [
        (("count", evaluation, blank), "needs two filled"),
        (("count", evaluation, blank, blank, "--readers", "a", "b", "--count", 2), "line 2: '1.A'"),
        (("count", evaluation, filled, filled, *given, "--seed", 1), "not of this sheet"),
        (("sheet", tmp_path / "nowhere.json"), "not an evaluation.json"),
    ]:
        failed = run(*arguments)
        assert failed.returncode == 2
        assert message in failed.stderr
        assert len(failed.stderr.splitlines()) == 1
