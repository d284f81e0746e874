"""What a person reads: tables that line up, dialogues that cannot harm a terminal."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minilora import InjectReport
from minilora.summarization.data.reading import Example
from minilora.summarization.errors import counted
from minilora.summarization.evaluation import compare, rouge
from minilora.summarization.report import terminal
from minilora.summarization.settings import RunConfig
from minilora.summarization.training.checkpoint import Progress
from minilora.summarization.training.session import Session, Split
from minilora.summarization.training.trainer import Outcome
from tests.helpers import BASE, EXAMPLES, TUNED


@pytest.fixture
def comparison() -> compare.Evaluation:
    return compare.compare(
        BASE, TUNED, EXAMPLES, data="minichat", split="test", generation={"beams": 4}
    )


def test_table_of_one_dialogue() -> None:
    one = compare.compare(BASE[:1], TUNED[:1], EXAMPLES[:1])
    assert "100.00 [100.00, 100.00]" in terminal.format_comparison(one)


def test_selection(comparison) -> None:
    assert terminal.most_changed(comparison, 2) == [1, 0]  # +100, then -33
    assert terminal.most_changed(comparison, 9) == [1, 0, 2]


def test_table(comparison) -> None:
    lines = terminal.format_comparison(comparison).splitlines()
    assert lines[0].startswith("3 dialogues, test split of minichat.")
    rows = lines[lines.index(next(line for line in lines if line.split()[:1] == ["base"])) :]
    assert [row.split()[0] for row in rows[1:6]] == list(rouge.MEASURES)
    assert len({len(row) for row in rows[:6]}) == 1  # aligned
    assert all(len(line) <= 100 and line.isascii() for line in lines)
    assert f"{comparison.intervals['base']['rouge1'].mean:.2f} [" in rows[1]
    assert re.search(r"\s\+22\.22 \[[+-]", rows[1])
    assert rows[6].startswith("ROUGE compares Unicode words")


def test_table_with_the_widest_numbers() -> None:
    base, tuned = [compare.Summary("", 1000)] * 2, [compare.Summary("a b c", 1)] * 2
    long = "x" * 300
    examples = [Example("a", "d", "a b c")] * 2
    lines = terminal.format_comparison(
        compare.compare(base, tuned, examples, data=long)
    ).splitlines()
    assert all(len(line) <= 100 for line in lines)


def test_examples(comparison) -> None:
    text = terminal.format_examples(comparison, [1, 0])
    assert text.index("[2 of 3] b") < text.index("[1 of 3] a")
    for line in (
        "  dialogue    Ann: cake?\n              Bob: yes\n",
        "  reference   Ann greets.\n",
        "  base        (empty)\n",
        "  fine-tuned  Bob wants tea.",
        "ROUGE-1: base 0.00, fine-tuned 100.00\n",
    ):
        assert line in text


def test_long_and_hostile_examples() -> None:
    dialogue = "\n".join(f"Ann: {i} " + "word " * 30 for i in range(10)) + "\x1b[2J \ud83d end"
    hostile = Example("a\x07", dialogue, "\x1b]0;title\x07 r")
    text = terminal.format_examples(compare.compare(BASE[:1], TUNED[:1], [hostile]), [0])
    assert "... 8 more lines" in text
    assert text.count("Ann: ") == 6
    assert all(len(line) <= 100 for line in text.splitlines())
    assert not re.search("[\x00-\x09\x0b-\x1f]", text)
    text = terminal.format_examples(
        compare.compare(BASE[:1], TUNED[:1], [hostile]), [0], dialogue_lines=99
    )
    text.encode()
    assert "more lines" not in text


def session(method: str) -> Session:
    run = RunConfig()
    run.model.method = method  # type: ignore[assignment]
    modules = ("a.0.q_proj", "a.1.q_proj") if method == "lora" else ()
    return SimpleNamespace(  # type: ignore[return-value]  # what the two screens read of it
        run=run,
        device=torch.device("cpu"),
        autocast_dtype=torch.bfloat16 if method == "lora" else None,
        splits={name: Split(EXAMPLES * 400, []) for name in ("train", "validation")},
        report=InjectReport(modules, 1_500, 3_000_000),
    )


def test_opening_says_what_is_trained_on_what_and_where_it_goes() -> None:
    text = terminal.header(session("lora"), Path("runs/x"))
    assert "pocket-bart on bookings: 1,200 dialogues to train, 1,200 to validate" in text
    assert "cpu, bfloat16" in text
    assert "lora: 2 modules, 1,500 trainable of 3,000,000 (0.0500%)" in text
    assert "run: runs/x" in text
    text = terminal.header(session("full"), Path("runs/x"))
    assert "cpu, float32" in text
    assert "full: 1,500 trainable of 3,000,000" in text
    assert "modules" not in text


def test_closing_says_what_it_cost_and_what_to_do_next() -> None:
    outcome = Outcome(Progress(1_200, seconds=150.0, peak_bytes=3 * 2**20), True, False)
    command = "python evaluate.py"
    lines = terminal.summary(session("lora"), outcome, Path("runs/x"), 200.0, command).splitlines()
    assert [line.split("  ")[-1].strip() for line in lines] == [
        "1,500 of 3,000,000 (0.0500%)",
        "3.3 minutes, of which training and validation took 2.5 minutes (1,200 steps)",
        "3 MiB",
        str(Path("runs/x/adapter")),
        "python evaluate.py runs/x --text chat.txt",
    ]
    page = Path("runs/x/report.html")
    more = terminal.summary(session("lora"), outcome, Path("runs/x"), 200.0, command, page)
    assert f"report                {page}\n" in more
    command = "python -m minilora evaluate"
    full = terminal.summary(session("full"), outcome, Path("a run"), 200.0, command)
    assert str(Path("a run/model")) in full
    assert "python -m minilora evaluate 'a run' --text chat.txt" in full


def test_one_of_a_thing_is_no_plural() -> None:
    assert [counted(n, "dialogue") for n in (0, 1, 1200)] == [
        "0 dialogues", "1 dialogue", "1,200 dialogues"
    ]  # fmt: skip
