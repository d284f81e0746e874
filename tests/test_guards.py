"""Memory that runs out, numbers that are none, files and directories that others write to."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartForConditionalGeneration

from minilora.summarization.cli import evaluate_main, train_main
from minilora.summarization.data.batches import Encoded
from minilora.summarization.errors import UserError
from minilora.summarization.model.device import is_out_of_memory
from minilora.summarization.settings import TrainingOptions
from minilora.summarization.training import ddp, failures, trainer
from minilora.summarization.training.fingerprint import differences
from minilora.summarization.training.lock import lock
from tests.helpers import SMALL, as_jsonl, dialogues, records, save_bart, save_data, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guards")
    save_bart(folder / "bart")
    save_data(folder / "data", train=12)
    return folder


def flags(folder: Path, *more: object) -> list[str]:
    base = ["--model", str(folder / "bart"), "--data", str(folder / "data"), *SMALL]
    return [*base, "--rank", "3", "--no-evaluate", *map(str, more)]


def row(name: str, source: int = 3, target: int = 2) -> Encoded:
    return Encoded(name, [5] * source, [6] * target)


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_are_of_memory(error: Exception, wanted: bool) -> None:
    assert is_out_of_memory(error) is wanted


def test_an_allocation_that_fails_is_known_as_such() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def scarce(monkeypatch: pytest.MonkeyPatch, rows: int) -> list[int]:
    """Memory suffices for so many dialogues and no more; the sizes that were tried."""
    original, sizes = ddp.summed_loss, list[int]()

    def summed_loss(model: Any, batch: Any) -> Any:
        result = original(model, batch)
        if model.training:
            sizes.append(len(batch["labels"]))
            if sizes[-1] > rows:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(ddp, "summed_loss", summed_loss)
    return sizes


def test_out_of_memory_names_the_batch_and_what_would_fit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    scarce(monkeypatch, 1)
    assert train_main(flags(folder, "--output", tmp_path / "run", "--batch-size", 4)) == 2
    line = capfd.readouterr().err
    found = re.search(
        r"out of memory in step 1 on a batch of 4 dialogues .*\((d\d+, ){3}d\d+\)", line
    )
    assert found, line
    assert "--batch-size 2 --accumulate 4" in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("AdamW", "AdamW updates the parameters: a lower --rank"),
        ("generate", "while summarizing one dialogue: lower --beams or --max-source-length"),
        ("base", "bart is moved to cpu: free some memory, or use --device cpu"),
    ],
)
def test_out_of_memory_elsewhere_is_a_line_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, what: str, says: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    output = ("--output", tmp_path / "run")
    if what == "AdamW":
        monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    elif what == "base":
        monkeypatch.setattr(BartForConditionalGeneration, "to", fail)
    else:
        assert train_main(flags(folder, *output, "--epochs", 1)) == 0
        capfd.readouterr()
        monkeypatch.setattr(BartForConditionalGeneration, "generate", fail)
    main = evaluate_main if what == "generate" else train_main
    argv = [str(tmp_path / "run")] if what == "generate" else flags(folder, *output)
    assert main(argv) == 2
    line = capfd.readouterr().err
    assert "out of memory while" in line
    assert says in line
    assert line.count("\n") == 1


def test_the_error_of_memory_suggests_what_has_the_same_batch() -> None:
    for size in range(1, 20):
        options = TrainingOptions(batch_size=size, accumulate=6)
        with pytest.raises(UserError) as caught, failures.step_memory([row("a")], options, 1):
            raise MemoryError
        found = re.search(r"--batch-size (\d+) --accumulate (\d+)", str(caught.value))
        assert bool(found) is (size > 1)
        assert not found or int(found[1]) * int(found[2]) == size * 6
        assert not found or 1 <= int(found[1]) <= size // 2


def test_the_error_of_memory_does_not_suggest_what_is_there_already() -> None:
    assert failures.smaller_evaluation_batch(5) == "lower --evaluation-batch-size, such as 2 for 5"
    assert failures.smaller_evaluation_batch(1) == "lower --beams or --max-source-length"


def test_of_many_dialogues_ten_are_named() -> None:
    group = [[row(f"d{i}") for i in range(40)]]
    with pytest.raises(UserError, match=r"dialogues d0, .*, d9 and 30 more: lower"):
        failures.require_finite("loss", float("nan"), group, 1)


# Numbers ------------------------------------------------------------------------------------------


def spoilt(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    original, step = ddp.summed_loss, trainer.Trainer.step
    now = [0]

    def count(trainer: Any, group: Any) -> Any:
        now[0] = trainer.progress.step + 1
        return step(trainer, group)

    def summed_loss(model: Any, batch: Any) -> Any:
        loss, tokens = original(model, batch)
        return (loss * torch.nan if model.training and now[0] in steps else loss), tokens

    monkeypatch.setattr(trainer.Trainer, "step", count)
    monkeypatch.setattr(ddp, "summed_loss", summed_loss)


def test_a_step_that_is_not_finite_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    spoilt(monkeypatch, 2)
    run = tmp_path / "run"
    assert train_main(flags(folder, "--output", run, "--checkpoint-steps", 1)) == 2
    said = capfd.readouterr().err
    assert re.search(r"loss is nan in step 2, on the dialogues ((d\d+(, )?){6}):", said), said
    assert said.count("\n") == 1


# Data ---------------------------------------------------------------------------------------------


def test_data_that_changed_since_the_start_is_refused_or_noted(
    folder: Path, tmp_path: Path, capfd: Any
) -> None:
    save_data(tmp_path / "data", train=6)
    run = tmp_path / "run"
    assert train_main(flags(folder, "--output", run, "--data", tmp_path / "data")) == 0
    write(tmp_path / "data" / "train.jsonl", as_jsonl(dialogues(5)))
    capfd.readouterr()
    assert train_main(["--resume", str(run)]) == 2
    line = capfd.readouterr().err
    assert "changed since the run began: train data; restore what changed, or use --acc" in line
    assert train_main(["--resume", str(run), "--accept-changes"]) == 0
    assert "note: changed since the run began: train data" in capfd.readouterr().err
    assert train_main(["--resume", str(run)]) == 0  # what was accepted is the run's now
    assert "changed since" not in capfd.readouterr().err


def test_other_validation_data_starts_the_choice_of_the_best_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    scores = iter([70.0, 60.0, 20.0, 10.0])

    def validate(_: object) -> dict[str, float]:
        return {"loss": 1.0, **dict.fromkeys(("rouge1", "rouge2", "rougeL"), next(scores))}

    monkeypatch.setattr(trainer, "validate", validate)
    save_data(tmp_path / "data", train=6)
    run = tmp_path / "run"
    argv = flags(folder, "--output", run, "--data", tmp_path / "data", "--epochs", 2)
    assert train_main([*argv, "--no-evaluate"]) == 0
    write(tmp_path / "data" / "validation.jsonl", as_jsonl(dialogues(4, 300)))
    capfd.readouterr()
    assert train_main(["--resume", str(run), "--epochs", "4", "--accept-changes"]) == 0
    said = "note: the validation data or settings changed: the best of the next epochs is saved\n"
    assert said in capfd.readouterr().err
    best = [record["best"] for record in records(run) if record["kind"] == "validation"]
    assert best == [True, False, True, False]


def test_other_validation_settings_start_it_anew_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ROUGE of other dialogues or of longer summaries is no measure for the best so far."""
    scores = iter([70.0, 60.0, 20.0])

    def validate(_: object) -> dict[str, float]:
        return {"loss": 1.0, **dict.fromkeys(("rouge1", "rouge2", "rougeL"), next(scores))}

    monkeypatch.setattr(trainer, "validate", validate)
    run = tmp_path / "run"
    assert train_main([*flags(folder, "--output", run, "--epochs", 1), "--no-evaluate"]) == 0
    again = ["--resume", str(run), "--accept-changes", "--validation-limit", "1"]
    assert train_main([*again, "--epochs", "3"]) == 0
    best = [record["best"] for record in records(run) if record["kind"] == "validation"]
    assert best == [True, True, False]


@pytest.mark.parametrize("part", ["prepare", "minilora.inject"])
def test_memory_that_ends_before_the_first_step_is_one_line(
    part: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f"minilora.summarization.training.session.{part}", fail)
    capfd.readouterr()
    assert train_main(flags(folder, "--output", tmp_path / "run")) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("train.py: out of memory while the ")
    assert not (tmp_path / "run").exists()


def test_data_that_one_resume_does_not_read_is_compared_by_the_next(
    folder: Path, tmp_path: Path, capfd: Any
) -> None:
    save_data(tmp_path / "data", train=6)
    run = tmp_path / "run"
    argv = flags(folder, "--output", run, "--data", tmp_path / "data", "--epochs", 1)
    assert train_main([*argv, "--evaluate"]) == 0
    more = ["--resume", str(run), "--epochs", "2", "--accept-changes", "--no-evaluate"]
    assert train_main(more) == 0
    write(tmp_path / "data" / "test.jsonl", as_jsonl(dialogues(4, 300)))
    capfd.readouterr()
    assert train_main(["--resume", str(run), "--evaluate"]) == 2
    assert "changed since the run began: test data" in capfd.readouterr().err


def test_a_refused_resume_keeps_the_settings(folder: Path, tmp_path: Path, capfd: Any) -> None:
    run = tmp_path / "run"
    assert train_main(flags(folder, "--output", run, "--epochs", 1)) == 0
    before = (run / "config.json").read_bytes()
    assert train_main(["--resume", str(run), "--rank", "4", "--accept-changes"]) == 2
    assert "holds other parameters" in capfd.readouterr().err
    assert (run / "config.json").read_bytes() == before


def test_paths_are_compared_by_where_they_lead(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    run = tmp_path / "run"
    assert train_main(flags(folder, "--output", run, "--epochs", 1)) == 0
    monkeypatch.chdir(folder)
    argv = ["--resume", str(run), "--model", "./bart/", "--data", "data"]
    assert train_main([*argv, "--output", os.path.relpath(run)]) == 0
    capfd.readouterr()
    assert train_main(["--resume", str(run), "--data", "elsewhere"]) == 2
    assert "--data (was " in capfd.readouterr().err


@pytest.mark.parametrize("name", ["torch", "precision"])
def test_another_torch_or_precision_is_noted(
    folder: Path, tmp_path: Path, capfd: Any, name: str
) -> None:
    """The run is not the one that was not interrupted. --precision auto depends on the device."""
    run = tmp_path / "run"
    assert train_main(flags(folder, "--output", run, "--epochs", 1)) == 0
    (checkpoint,) = (run / "checkpoints").iterdir()
    state = json.loads((checkpoint / "state.json").read_text())
    now = state["origin"][name]
    assert now == {"torch": torch.__version__, "precision": "float32"}[name]
    state["origin"][name] = "1.0"
    write(checkpoint / "state.json", json.dumps(state).encode())
    sums = [
        f"{hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("state.safetensors", "state.json")
    ]
    write(checkpoint / "SHA256SUMS", "".join(sums).encode())
    capfd.readouterr()
    assert train_main(["--resume", str(run)]) == 0
    assert f"{name} 1.0" not in capfd.readouterr().err  # no step is taken
    assert train_main(["--resume", str(run), "--epochs", "2", "--accept-changes"]) == 0
    said = f"note: the run began with {name} 1.0 and continues with {now}: the "
    assert said in capfd.readouterr().err


def test_another_model_in_the_same_directory_is_noticed(
    folder: Path, tmp_path: Path, capfd: Any
) -> None:
    save_bart(tmp_path / "bart")
    run = tmp_path / "run"
    argv = flags(folder, "--output", run, "--model", tmp_path / "bart", "--epochs", 1)
    assert train_main(argv) == 0
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    save_bart(tmp_path / "bart", seed=1)
    assert train_main(["--resume", str(run)]) == 2
    assert "changed since the run began: base model" in capfd.readouterr().err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_changed_settings_are_refused_or_kept(folder: Path, tmp_path: Path, capfd: Any) -> None:
    run = tmp_path / "run"
    assert train_main(flags(folder, "--output", run, "--epochs", 1)) == 0
    more = ["--resume", str(run), "--epochs", "2"]
    assert train_main(more) == 2
    assert "--epochs (was 1, is 2). Restore them, or add --accept-changes" in capfd.readouterr().err
    assert train_main([*more, "--accept-changes"]) == 0
    assert [r["epoch"] for r in records(run) if r["kind"] == "validation"] == [1, 2]
    config = json.loads((run / "config.json").read_text())
    assert (config["epochs"], config["accept_changes"], config["resume"]) == (2, False, None)
    assert train_main(["--resume", str(run)]) == 0  # the new settings are the run's now
    capfd.readouterr()
    assert train_main(["--resume", str(run), "--output", "x", "--accept-changes"]) == 2
    assert "--output" in capfd.readouterr().err


def test_what_differs_is_named_once() -> None:
    before = {"train data": "a", "train tokens": "b", "test data": "c", "base model": "d"}
    assert differences(before, before) == []
    assert differences({}, before) == []
    assert differences(before, before | {"train data": "x", "train tokens": "y"}) == ["train data"]
    assert differences(before, before | {"train tokens": "y"}) == ["train tokens"]
    assert differences(before, {"base model": "x"}) == ["base model"]


# The directory ------------------------------------------------------------------------------------


def test_a_directory_is_one_runs_and_free_again_after_it(tmp_path: Path) -> None:
    with lock(tmp_path):
        with (
            pytest.raises(
                UserError, match=f"process {os.getpid()} is already training in this directory"
            ),
            lock(tmp_path),
        ):
            pytest.fail("two at once")
        assert (tmp_path / ".lock").read_text() == str(os.getpid())  # a refusal takes nothing away
    assert list(tmp_path.iterdir()) == []
    with lock(tmp_path):
        pass


@pytest.mark.slow
def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "import importlib.util, types\n"
        "from minilora.summarization.training.lock import lock\n"
        "with lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    root = str(Path(__file__).resolve().parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), root], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=f"process {process.pid} is already training"),
            lock(tmp_path),
        ):
            pytest.fail("two at once")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / ".lock").exists()
    with lock(tmp_path):
        pass


def test_two_runs_into_one_directory(folder: Path, tmp_path: Path, capfd: Any) -> None:
    run = tmp_path / "run"
    assert train_main(flags(folder, "--output", run, "--epochs", 1)) == 0
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with lock(run):
        capfd.readouterr()
        assert train_main(["--resume", str(run)]) == 2
        assert (
            f"process {os.getpid()} is already training in this directory" in capfd.readouterr().err
        )
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
