"""A machine without datasets and rouge_score trains; what needs them is left out or says so."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import minilora
from minilora.summarization.cli import evaluate_main, train_main
from tests.helpers import SMALL, records, save_bart, save_data


@pytest.fixture
def argv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The flags of a small run; importing the two packages raises ImportError."""
    for name in ("datasets", "rouge_score"):
        monkeypatch.setitem(sys.modules, name, None)
    save_bart(tmp_path / "bart")
    save_data(tmp_path / "data")
    base = ["--model", str(tmp_path / "bart"), "--data", str(tmp_path / "data"), *SMALL]
    return [*base, "--rank", "3", "--output", str(tmp_path / "run")]


def test_training_goes_by_the_validation_loss_and_scores_nothing(
    argv: list[str], tmp_path: Path, capfd: Any
) -> None:
    assert train_main(argv) == 0
    run, (out, err) = tmp_path / "run", capfd.readouterr()
    assert err.count("note: rouge_score is not installed: the validation loss chooses") == 1
    assert "ROUGE" not in out
    assert not (run / "evaluation.json").exists()
    assert (run / "report.html").exists()
    validations = [row for row in records(run) if row["kind"] == "validation"]
    assert [row["rouge1"] for row in validations] == [None, None]
    losses = [row["loss"] for row in validations]
    best = min(range(2), key=losses.__getitem__)
    state = json.loads(sorted(run.glob("checkpoints/*/state.json"))[-1].read_text())["progress"]
    assert state["best"] == -losses[best]
    assert state["best_step"] == validations[best]["step"]
    assert minilora.read_adapter(run / "adapter").modules


def test_scoring_and_hub_data_end_in_one_line_and_a_text_is_summarized(
    argv: list[str], tmp_path: Path, capfd: Any
) -> None:
    assert train_main([*argv, "--max-steps", "1"]) == 0
    capfd.readouterr()
    assert evaluate_main([str(tmp_path / "run")]) == 2
    message = "evaluate.py: ROUGE needs the package rouge_score: pip install rouge_score\n"
    assert capfd.readouterr() == ("", message)
    text = tmp_path / "chat.txt"
    text.write_text("Ann: shall we meet at school?\nBob: ok")
    assert evaluate_main([str(tmp_path / "run"), "--text", str(text)]) == 0
    assert capfd.readouterr().out.strip()
    assert train_main(["--data", "someone/chats", "--output", str(tmp_path / "other")]) == 2
    message = "train.py: someone/chats: reading it needs a package: pip install datasets\n"
    assert capfd.readouterr() == ("", message)
