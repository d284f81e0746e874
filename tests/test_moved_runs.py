"""A run whose model and data are beside it works from another folder, and after all have moved."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from minilora.__main__ import main
from minilora.summarization.cli import evaluate_main, train_main
from minilora.summarization.presets import ASSETS, embedded, local_path, restored, stored
from minilora.summarization.settings import SPLITS
from tests.helpers import SMALL, records, save_bart, save_data


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, data and a run, all named by relative paths; moved afterwards."""
    folder = tmp_path / "before" / "project"
    save_bart(folder / "bart")
    save_data(folder / "data")
    monkeypatch.chdir(folder)
    data = ["--train-file", "data/train.jsonl", "--validation-file", "data/validation.jsonl"]
    argv = ["--model", "bart", *data, "--test-file", "data/test.jsonl", *SMALL, "--rank", "3"]
    assert train_main([*argv, "--no-evaluate", "--output", "runs/x"]) == 0
    moved = tmp_path / "moved"
    monkeypatch.chdir(tmp_path)
    folder.rename(moved)
    return moved


def test_a_moved_run_is_scored_and_merged(project: Path, capfd: Any) -> None:
    settings = json.loads((project / "runs" / "x" / "config.json").read_text())
    assert settings["model"] == "./../../bart"
    assert settings["test_file"] == "./../../data/test.jsonl"
    assert settings["data"] == "bookings"  # not used, since files are named
    assert evaluate_main(["moved/runs/x", "--output", "scores.json"]) == 0
    scores = json.loads(Path("scores.json").read_text())
    assert scores["n"] == 4
    assert scores["data"].endswith("moved/data/test.jsonl")
    assert main(["report", "moved/runs/x"]) == 0
    page = (project / "runs" / "x" / "report.html").read_text()
    assert ">moved/bart, LoRA of rank 3<" in page
    assert main(["merge", "moved/runs/x", "merged"]) == 0
    assert (Path("merged") / "model.safetensors").exists()


def test_a_moved_run_is_resumed_and_says_that_it_is_finished(project: Path, capfd: Any) -> None:
    before = records(project / "runs" / "x")
    capfd.readouterr()
    assert train_main(["--resume", "moved/runs/x"]) == 0
    note = "note: moved/runs/x is finished: it is only scored again\n"
    assert note in capfd.readouterr().err
    assert records(project / "runs" / "x") == before


def test_a_run_whose_data_have_moved_is_told_where_they_are(project: Path, capfd: Any) -> None:
    (project / "runs" / "x").rename("alone")
    data = [f"--{split}-file=moved/data/{split}.jsonl" for split in SPLITS]
    argv = ["--resume", "alone", "--model", "moved/bart"]
    capfd.readouterr()
    assert train_main([*argv, *data]) == 0
    assert "alone is finished" in capfd.readouterr().err
    other = "--train-file=moved/data/test.jsonl"  # the content is compared
    assert train_main([*argv, *data, other]) == 2
    assert "changed since the run began: train data" in capfd.readouterr().err


def test_a_run_on_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`runs` is a symbolic link; the run is reached through it and by its real path."""
    for folder in ("home/project", "disk/deep/runs", "other/x/y/z"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home" / "project")
    save_bart(Path("bart"))
    save_data(Path("data"))
    Path("runs").symlink_to("../../disk/deep/runs")
    argv = ["--model", "bart", "--data", "data", *SMALL, "--max-steps", "2", "--rank", "3"]
    assert train_main([*argv, "--no-evaluate", "--output", "runs/x"]) == 0
    same = ["--model", "bart", "--resume", "runs/x", "--no-evaluate"]
    assert train_main(same) == 0  # the same model, as it was typed
    for where, run in ((".", "runs/x"), ("../../other/x/y/z", tmp_path / "disk/deep/runs/x")):
        monkeypatch.chdir(where)
        assert evaluate_main([str(run), "--output", "scores.json"]) == 0
        scores = json.loads(Path("scores.json").read_text())
        assert Path(scores["data"]).resolve() == tmp_path / "home" / "project" / "data"


def test_what_a_run_lost_is_not_taken_from_the_working_directory(project: Path, capfd: Any) -> None:
    (project / "runs" / "x").rename("alone")
    settings = json.loads(Path("alone/config.json").read_text())
    assert settings["model"] == "./../../bart"
    (project / "runs" / "deep").mkdir()
    os.chdir(project / "runs" / "deep")  # from here it would lead to the project's own
    assert Path(settings["model"]).is_dir()
    capfd.readouterr()
    assert evaluate_main(["../../../alone"]) == 2
    assert "no such file" in capfd.readouterr().err


def test_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs/x")
    for folder in ("bart", "runs/x/inside", "../elsewhere"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name in ("bart", "runs/x/inside", "../elsewhere"):
        assert stored(name, run).startswith("./")
        assert restored(stored(name, run), run) == name
    for name in (str(tmp_path / "bart"), "pocket-bart", "facebook/bart-base", "~/bart"):
        assert stored(name, run) == restored(name, run) == name
    # What is gone is named by where it was looked for.
    assert restored("./gone", run) == "runs/x/gone"
    (tmp_path / "typed").mkdir()  # an earlier version stored what was typed
    assert restored("./typed", run) == "./typed"


def test_a_run_that_moved_alone_says_where_its_base_is_missing(project: Path, capfd: Any) -> None:
    (project / "runs" / "x").rename("alone")
    capfd.readouterr()
    Path("chat.txt").write_text("Ann: hi")
    assert evaluate_main(["alone", "--text", "chat.txt"]) == 2
    missing = Path("alone/../../bart").resolve()
    found = capfd.readouterr().err.removeprefix("evaluate.py: model ").partition(":")
    assert Path(found[0]).resolve() == missing
    assert found[2] == " no such directory; give its path with --model\n"
    assert evaluate_main(["alone", "--text", "chat.txt", "--model", str(project / "bart")]) == 0


def test_a_path_into_another_machines_package_is_the_embedded_model() -> None:
    """An adapter names its base so; PEFT needs a path there."""
    path = "/home/ann/.venv/lib/site-packages/minilora/summarization/assets/pocket-bart"
    assert local_path(path) == ASSETS / "pocket-bart"
    other = path.replace("pocket-bart", "other-bart")
    assert embedded(other) == other
    assert embedded("assets/pocket-bart") == "assets/pocket-bart"
