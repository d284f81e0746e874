"""Both entry points: what they print, what they refuse in one line, and what they leave behind."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import minilora
from minilora.__main__ import main as command_line
from minilora.summarization import commands, flags, processes
from minilora.summarization.cli import evaluate_main, train_main
from minilora.summarization.evaluation import nonsense
from minilora.summarization.evaluation.compare import Summary
from minilora.summarization.evaluation.rouge import MEASURES
from minilora.summarization.presets import ASSETS, PRESETS
from tests.helpers import (
    SMALL,
    as_jsonl,
    byte_level_bpe,
    dialogues,
    save_bart,
    save_data,
    small_bart,
    write,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bart, data and two runs (an adapter of it, one of another model): read, never written."""
    folder = tmp_path_factory.mktemp("cli")
    save_bart(folder / "bart")
    save_bart(folder / "wide", d_model=32, encoder_layers=2)
    save_data(folder / "data")
    for name, model in (("run", "bart"), ("other", "wide")):
        argv = ["--model", folder / model, "--data", folder / "data", "--output", folder / name]
        assert train_main([*map(str, argv), *SMALL, "--max-steps", "2"]) == 0
    return folder


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with copies of the folder's contents beside it."""
    for path in folder.iterdir():
        shutil.copytree(path, tmp_path / path.name)
    (tmp_path / "here").mkdir()
    write(tmp_path / "blank.txt", b"\xef\xbb\xbf \n\t")
    write(tmp_path / "latin.txt", b"Ann: caf\xe9")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


BASE = ["--model", "../bart", "--data", "../data", *SMALL]


def call(main: Callable[[list[str]], int], *argv: object) -> int:
    try:
        return main([str(argument) for argument in argv])
    except SystemExit as error:
        return int(error.code or 0)


def listing(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b"/"
        for path in directory.rglob("*")
    }


def refused(
    main: Callable[[list[str]], int], here: Path, capfd: Any, argv: list[object], *says: str
) -> str:
    """Exit code 2, one line on standard error, nothing on standard output, no file touched."""
    before = listing(here.parent)
    assert call(main, *argv) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith(f"{'train' if main is train_main else 'evaluate'}.py: ")
    assert err[:-1].isprintable()
    assert len(err) < 900
    for part in says:
        assert part in err
    assert listing(here.parent) == before
    return str(err)


# train.py: what is refused ------------------------------------------------------------------------

BAD_FLAGS: dict[str, tuple[list[str], list[str]]] = {
    "a misspelt target": (["--targets", "q_porj"], ["'q_porj'", "nearest: q_proj"]),
    "one of two targets": (["--targets", "q_proj", "fc9"], ["'fc9'", "nearest: fc"]),
    "a pattern that matches nothing": (["--targets", r".*\.nothing"], ["nothing matches"]),
    "a broken pattern": (["--targets", "q_proj("], ["not a regular expression"]),
    "a misspelt exclude": (["--exclude", "k_porj"], ["exclude", "'k_porj'", "nearest"]),
    "rank 0": (["--rank", "0"], ["--rank must be above 0", "not 0"]),
    "rank 0 of AdaLoRA": (["--rank", "0", "--method", "adalora"], ["--rank must be above 0"]),
    "a negative rank": (["--rank", "-3"], ["rank", "-3"]),
    "a rank too large": (["--rank", "17"], ["rank 17 is above the smaller side", "16"]),
    "a rank that is no number": (["--rank", "eight"], ["--rank", "'eight'"]),
    "alpha 0": (["--alpha", "0"], ["alpha", "above 0"]),
    "dropout 1": (["--dropout", "1"], ["dropout", "[0, 1)"]),
    "no epochs": (["--epochs", "0"], ["--epochs must be above 0"]),
    "a negative learning rate": (["--learning-rate", "-1"], ["--learning-rate", "above 0"]),
    "an endless learning rate": (["--learning-rate", "inf"], ["--learning-rate"]),
    "warmup 1": (["--warmup", "1"], ["--warmup", "share"]),
    "a negative seed": (["--seed", "-1"], ["--seed"]),
    "a seed too large": (["--seed", str(2**64)], ["--seed", "2^63"]),
    "a negative decay": (["--weight-decay", "-1"], ["--weight-decay"]),
    "an endless decay": (["--weight-decay", "inf"], ["--weight-decay must be finite, not inf"]),
    "a negative limit": (["--validation-limit", "-1"], ["--validation-limit"]),
    "lengths that contradict": (
        ["--min-length", "13"],
        ["--min-length <= --max-length", "not 13 and 12"],
    ),
    "a limit below the special tokens": (["--max-source-length", "2"], ["--max-source-length 2"]),
    "no such device": (["--device", "cuda:77"], ["--device cuda:77"]),
    "a device of another torch": (["--device", "hpu"], ["--device hpu"]),
    "layers of a name that is short for many": (
        ["--targets", "decoder", "--layers", "0"],
        ["--layers does not go with --targets decoder", "--targets q_proj v_proj"],
    ),
    "no such method": (["--method", "lroa"], ["--method", "'lroa'"]),
    "no such preset": (["--preset", "samsum"], ["--preset", "'samsum'"]),
    "a misspelt flag": (["--rnak", "8"], ["--rnak", "nearest: --rank"]),
    "a misspelt flag with its value": (["--learning_rat=1"], ["nearest: --learning-rate"]),
    "an abbreviated flag": (["--acc", "2"], ["--acc"]),
    "an argument without a flag": (["samsum"], ["samsum"]),
    "a flag without its value": (["--rank"], ["--rank", "expected one argument"]),
    "a run that is none": (["--resume", "../data"], ["../data is not a run", "config.json"]),
    "a model of an unknown user": (["--model", "~nobody-at-all/bart"], ["no such directory"]),
    "data of an unknown user": (["--data", "~nobody-at-all/chats"], ["no such file"]),
    "a penalty that is none": (["--length-penalty", "nan"], ["--length-penalty", "finite"]),
    "a run that is not there": (["--resume", "nothing"], ["nothing is not a run"]),
}


@pytest.mark.parametrize(("flags", "says"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags(here: Path, capfd: Any, flags: list[str], says: list[str]) -> None:
    refused(train_main, here, capfd, [*BASE, *flags], *says)


def lines(*rows: Any) -> bytes:
    return as_jsonl([*dialogues(5), *rows])


BAD_DATA: dict[str, tuple[str, bytes | None, str, list[str]]] = {
    "missing": ("train.jsonl", None, "../data/train.jsonl", ["no such file"]),
    "a directory that is missing": ("x", None, "../dtaa", ["no such file", "data"]),
    "empty": ("train.jsonl", b"", "../data", ["train.jsonl: no rows"]),
    "not JSON": ("train.jsonl", lines() + b"{oops\n", "../data", ["line 6", "not JSON"]),
    "lacks a column": (
        "train.jsonl",
        lines({"dialogue": "a", "text": "b"}),
        "../data",
        ["line 6", "no column 'summary'", "dialogue, text"],
    ),
    "an empty summary": (
        "train.jsonl",
        lines({"dialogue": "a", "summary": " ", "id": "bad"}),
        "../data",
        ["line 6 (id bad)", "empty summary"],
    ),
    "an empty validation file": ("validation.jsonl", b"", "../data", ["validation.jsonl: no rows"]),
    # found now, not after an hour of training
    "a bad test row": (
        "test.jsonl",
        lines({"dialogue": "a", "summary": ""}),
        "../data",
        ["test.jsonl line 6", "empty summary"],
    ),
}


@pytest.mark.parametrize(("name", "content", "data", "says"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data(
    here: Path, capfd: Any, name: str, content: bytes | None, data: str, says: list[str]
) -> None:
    path = here.parent / "data" / name
    path.unlink(missing_ok=True)
    if content is not None:
        write(path, content)
    argv = ["--model", "../bart", *SMALL, "--data", data]
    refused(train_main, here, capfd, argv, *says)


def llama(directory: Path) -> None:
    sizes = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 24}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(directory)
    byte_level_bpe().save_pretrained(directory)


BAD_MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no weights": (lambda path: (path / "model.safetensors").unlink(), ["holds no weights"]),
    "no config": (lambda path: (path / "config.json").unlink(), ["has no config.json"]),
    "no tokenizer": (
        lambda path: [file.unlink() for file in path.glob("*token*")],
        ["no tokenizer"],
    ),
    "damaged weights": (
        lambda path: (path / "model.safetensors").write_bytes(b"not weights"),
        ["SafetensorError"],
    ),
    "no encoder-decoder": (lambda path: [shutil.rmtree(path), llama(path)], ["llama"]),
    "a vocabulary too small": (
        lambda path: small_bart(vocab_size=100).save_pretrained(path),
        ["only 100 embeddings", "belongs to another model"],
    ),
}


@pytest.mark.parametrize(("damage", "says"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_models(here: Path, capfd: Any, damage: Any, says: list[str]) -> None:
    damage(here.parent / "bart")
    capfd.readouterr()  # transformers' bar while it saves
    refused(train_main, here, capfd, BASE, "../bart", *says)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "pocket"])
def test_hub_presets_fail_offline_in_one_line(here: Path, capfd: Any, preset: str) -> None:
    argv = ["--preset", preset]
    refused(train_main, here, capfd, argv, "facebook/bart", "offline it is not in the")
    argv += ["--model", "../bart"]
    refused(train_main, here, capfd, argv, "knkarthick/samsum", "offline it is not in the")


def test_an_output_that_holds_a_run_is_never_written_over(here: Path, capfd: Any) -> None:
    says = ["../run holds a run already", "--resume ../run", "name another"]
    refused(train_main, here, capfd, [*BASE, "--output", "../run"], *says)
    line = refused(train_main, here, capfd, [*BASE, "--output", "../data"], "not empty")
    assert "--resume" not in line
    refused(train_main, here, capfd, [*BASE, "--output", "../data/test.jsonl"], "is a file")
    refused(train_main, here, capfd, [*BASE, "--output", "/proc/none/x"], "/proc/none")


def test_resume_refuses_other_settings_by_name(here: Path, capfd: Any) -> None:
    resume: list[object] = ["--resume", "../run"]
    line = refused(
        train_main,
        here,
        capfd,
        [*resume, "--rank", "4", "--learning-rate", "0.5", "--targets", "fc1"],
        "--rank (was 8, is 4)",
        "--learning-rate (was 0.02, is 0.5)",
        "--targets (was ['q_proj', 'v_proj'], is ['fc1'])",
    )
    assert "--batch-size" not in line
    for more in ([], ["--accept-changes"]):  # a run cannot move, and a preset has many settings
        for name, other in (("output", "elsewhere"), ("preset", "notebook")):
            says = f"--resume ../run keeps its {name}: leave --{name} out"
            refused(train_main, here, capfd, [*resume, *more, f"--{name}", other], says)
    (here.parent / "run" / "config.json").write_text('{"rnak": 8}')
    refused(train_main, here, capfd, resume, "config.json", "rnak")
    (here.parent / "run" / "config.json").write_text("{")
    refused(train_main, here, capfd, resume, "config.json", "JSON")


def test_resume_may_change_where_it_runs(here: Path, capfd: Any) -> None:
    before = (here.parent / "run" / "config.json").read_bytes()
    argv = ["--resume", "../run", "--device", "auto", "--no-evaluate", "--checkpoint-minutes", "5"]
    assert call(train_main, *argv, "--rank", "8") == 0
    assert (here.parent / "run" / "config.json").read_bytes() == before


def test_a_loss_that_is_not_finite_ends_in_one_line(here: Path, capfd: Any) -> None:
    argv = [*BASE, "--output", "run", "--learning-rate", "1e30", "--clip", "0"]
    assert call(train_main, *argv) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert re.search(r"the (loss|gradient's norm) is (nan|inf) in step \d, on the dialogues d", err)


# train.py: a run ----------------------------------------------------------------------------------


def test_the_last_screen_shows_what_was_trained_what_it_cost_and_what_it_gained(
    here: Path, capfd: Any
) -> None:
    assert call(train_main, *BASE, "--max-steps", "1", "--rank", "3") == 0
    out, err = capfd.readouterr()
    assert err == ""
    for part in (
        r"trainable parameters  576 of [\d,]+ \(\d+\.\d{4}%\)",
        r"time                  \d+ seconds, of which .* took \d+ seconds \(1 step\)",
        r"peak memory           [\d,]+ MiB",
        r"\nrouge1 .*\nrouge2 .*\nrougeL ",
        r"python evaluate\.py runs/bart-data-lora-r3 --text",
    ):
        assert re.search(part, out), part
    assert [out.count(f"\n  {label}") for label in ("dialogue ", "reference ", "base ")] == [3] * 3
    assert "[1 of 4] d200" in out  # the first, not the best
    assert "report                runs/bart-data-lora-r3/report.html" in out
    assert "of rank 3" in Path("runs/bart-data-lora-r3/report.html").read_text()
    evaluation = json.loads(Path("runs/bart-data-lora-r3/evaluation.json").read_text())
    assert evaluation["n"] == 4
    shares = nonsense.MEASURES
    for side in ("base", "finetuned"):
        assert list(evaluation[side]) == [*MEASURES, *shares]
    assert list(evaluation["reference"]) == list(shares)


def test_a_second_run_gets_the_next_name(here: Path, capfd: Any) -> None:
    argv = [*BASE, "--max-steps", "1", "--no-evaluate"]
    for _ in range(3):
        assert call(train_main, *argv) == 0
    assert call(train_main, *argv, "--method", "full") == 0
    names = [path.name for path in Path("runs").iterdir()]
    assert sorted(names) == [
        *("bart-data-full", "bart-data-lora-r8", "bart-data-lora-r8-2", "bart-data-lora-r8-3"),
    ]
    assert not Path("runs/bart-data-lora-r8/evaluation.json").exists()
    assert "evaluate.py runs/bart-data-lora-r8-3" in capfd.readouterr().out


def test_the_decoder_can_be_left_alone(here: Path) -> None:
    names = ["--targets", "all-linear", "--exclude", "decoder", "--max-steps", "1"]
    assert call(train_main, *BASE, *names, "--no-evaluate", "--output", "run") == 0
    modules = minilora.read_adapter("run/adapter").modules
    assert {name.rpartition(".")[2] for name in modules} >= {"q_proj", "out_proj", "fc1", "fc2"}
    assert all(name.startswith("model.encoder.") for name in modules)


def test_a_merged_run_decodes_with_the_lengths_of_the_run(here: Path) -> None:
    config = GenerationConfig(max_length=99, min_length=7, max_new_tokens=80, length_penalty=2.0)
    path = here.parent / "bart" / "generation_config.json"
    given = json.loads(path.read_text()) | config.to_diff_dict()
    path.write_text(json.dumps(given))
    argv = [*BASE, "--max-steps", "1", "--max-length", "11", "--min-length", "2"]
    for method in ("lora", "full"):
        assert call(train_main, *argv, "--method", method, "--output", method) == 0
    assert call(command_line, "merge", "lora", "merged") == 0
    found = [GenerationConfig.from_pretrained(p).to_diff_dict() for p in ("merged", "full/model")]
    assert found[0] == found[1]
    assert (found[0]["max_length"], found[0].get("max_new_tokens")) == (11, None)


def test_an_empty_directory_is_a_fine_output(here: Path) -> None:
    Path("new").mkdir()
    assert call(train_main, *BASE, "--max-steps", "1", "--no-evaluate", "--output", "new") == 0


def test_what_is_left_out_or_cut_is_said(here: Path, capfd: Any) -> None:
    with (here.parent / "data" / "train.jsonl").open("ab") as file:
        file.write(as_jsonl([{"id": "none", "dialogue": " ", "summary": "Nothing."}]))
    argv = [*BASE, "--max-steps", "1", "--no-evaluate", "--max-source-length", "20"]
    assert call(train_main, *argv) == 0
    notes = capfd.readouterr().err.splitlines()
    assert "note: ../data/train.jsonl line 21 (id none): empty dialogue, left out" in notes
    assert any(re.match(r"note: train: \d+ of 20 dialogues cut to --max-source", n) for n in notes)


@pytest.mark.parametrize(
    "targets", [["all-linear"], [r".*decoder.*\.(q|v)_proj"], ["fc1", "encoder.layers.0.fc2"]]
)
def test_targets_are_names_or_a_regular_expression(here: Path, targets: list[str]) -> None:
    argv = [*BASE, "--max-steps", "1", "--no-evaluate", "--output", "run", "--rank", "2"]
    assert call(train_main, *argv, "--targets", *targets) == 0
    modules = minilora.read_adapter("run/adapter").modules
    assert len(modules) == {"all-linear": 16, "fc1": 3}.get(targets[0], 4)


def test_the_report_is_written_if_wanted_and_its_failure_is_only_told_of(
    here: Path, capfd: Any, monkeypatch: Any
) -> None:
    argv = [*BASE, "--max-steps", "1", "--no-evaluate"]
    assert call(train_main, *argv, "--output", "a", "--no-report") == 0
    assert not Path("a/report.html").exists()

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(commands, "write_report", fail)
    assert call(train_main, *argv, "--output", "b") == 0
    out, err = capfd.readouterr()
    assert err == "note: b/report.html was not written: no space left on device\n"
    assert "report  " not in out


def test_runs_that_start_together_get_names_of_their_own(here: Path) -> None:
    run = flags.parse_run(BASE)
    found = [str(flags.output_directory(run)) for _ in range(3)]
    assert found == [
        "runs/bart-data-lora-r8",
        "runs/bart-data-lora-r8-2",
        "runs/bart-data-lora-r8-3",
    ]
    assert all(list(Path(name).iterdir()) == [] for name in found)
    Path("runs/bart-data-lora-r8-4").write_text("a file")
    assert call(train_main, *BASE, "--max-steps", "1", "--no-evaluate") == 0
    assert Path("runs/bart-data-lora-r8-5/adapter").is_dir()


def test_a_run_of_other_model_or_data_has_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("chats/mine.v2.jsonl"), b"")
    for typed, name in {
        "": "pocket-lora-r8",
        "--data bookings": "pocket-lora-r8-2",
        "--data minichat": "pocket-bart-minichat-lora-r8",
        "--preset bart-base-samsum": "bart-base-samsum-lora-r8",
        "--model google/flan-t5-base --data ./chats/": "flan-t5-base-chats-lora-r8",
        "--data chats/mine.v2.jsonl --method full": "pocket-bart-mine.v2-full",
        "--train-file chats/mine.v2.jsonl --validation-file v": "pocket-bart-mine.v2-lora-r8",
    }.items():
        assert str(flags.output_directory(flags.parse_run(typed.split()))) == f"runs/{name}"


def stdout_of(kind: str, patch: pytest.MonkeyPatch) -> None:
    """Standard output that cannot be written: its reader is gone, or its disk is full."""
    if kind == "closed":
        patch.setattr(sys, "stdout", None)
        return
    receive, send = os.pipe()
    os.close(receive)
    where = send if kind == "broken" else os.open("/dev/full", os.O_WRONLY)
    patch.setattr(sys, "stdout", os.fdopen(where, "w"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("kind", ["broken", "full", "closed"])
def test_work_goes_on_where_nobody_can_read_what_it_prints(
    here: Path, capfd: Any, kind: str
) -> None:
    note = "note: standard output cannot be written (No space left on device): what is printed "
    said, code = (f"{note}is lost\n", 2) if kind == "full" else ("", 0)
    for main, *argv in (
        (train_main, *BASE, "--max-steps", "1", "--output", "run"),
        (evaluate_main, "run", "--output", "scores.json"),
        (evaluate_main, "run", "--predict", "../data/test.jsonl", "--output", "out.jsonl"),
        (command_line, "inspect", "run"),
        (command_line, "merge", "run", "merged"),
        (command_line, "report", "run"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            stdout_of(kind, patch)
            assert call(main, *argv) == code
            print("and nothing fails afterwards", flush=True)
        assert capfd.readouterr().err == said
    written = ["run/evaluation.json", "run/report.html", "scores.json", "out.jsonl"]
    assert all(Path(name).exists() for name in [*written, "merged/model.safetensors"])


def test_any_of_barts_shapes_trains(here: Path) -> None:
    shape = {"encoder_layers": 3, "decoder_ffn_dim": 40, "decoder_attention_heads": 4}
    save_bart(here / "shape", max_position_embeddings=33, tie_word_embeddings=False, **shape)
    argv = ["--model", "shape", "--data", "../data", *SMALL, "--max-length", "80"]
    assert call(train_main, *argv, "--max-steps", "2", "--output", "run") == 0
    assert len(minilora.read_adapter("run/adapter").modules) == 10
    assert json.loads(Path("run/config.json").read_text())["max_length"] == 80
    assert call(evaluate_main, "run", "--limit", "1") == 0


def test_the_command_is_the_one_that_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = processes.active
    for called, wanted in (
        ("train.py", "python train.py"),
        ("../a b/train.py", "python '../a b/train.py'"),
        ("/x/evaluate.py", "python /x/train.py"),
        ("/x/minilora/__main__.py", "python -m minilora train"),
        ("/x/pytest/__main__.py", "python train.py"),
        ("/x/bin/minilora", "minilora train"),
    ):
        monkeypatch.setattr(sys, "argv", [called, "--rank", "8"])
        assert flags.command("train.py") == wanted
        monkeypatch.setattr(processes, "active", lambda: True)
        monkeypatch.setattr(processes, "world_size", lambda: 2)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        by_torchrun = wanted.replace("minilora train", "-m minilora train").removeprefix("python ")
        by_torchrun = by_torchrun.replace("-m -m", "-m")
        assert flags.command("train.py") == f"torchrun --nproc-per-node 2 {by_torchrun}"
        assert flags.command("evaluate.py").startswith(("python ", "minilora "))
        monkeypatch.setattr(processes, "active", alone)


def test_interrupted_before_or_after_training_it_says_so(
    here: Path, capfd: Any, monkeypatch: Any
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "evaluate", interrupt)
    assert call(train_main, *BASE, "--max-steps", "1", "--output", "run") == 130
    assert "score it with: python train.py --resume run" in capfd.readouterr().out
    assert "not scored yet" in Path("run/report.html").read_text()
    monkeypatch.setattr(commands, "open_session", interrupt)
    assert call(train_main, *BASE, "--output", "other") == 130
    assert capfd.readouterr().err == "train.py: interrupted\n"
    assert not Path("other").exists()


@pytest.mark.slow
def test_the_embedded_model_trains_on_the_embedded_dialogues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    if not (ASSETS / "pocket-bart" / "config.json").is_file():
        pytest.skip("assets/pocket-bart is not there yet")
    monkeypatch.chdir(tmp_path)
    argv = ["--rank", "4", "--max-steps", "2", "--validation-limit", "2", "--no-evaluate"]
    assert call(train_main, *argv, "--beams", "1", "--min-length", "5", "--max-length", "10") == 0
    out, err = capfd.readouterr()
    assert "pocket-bart on bookings: 1,200 dialogues to train, 150 to validate" in out
    assert all(line.startswith("note: ") for line in err.splitlines())
    assert minilora.read_adapter(tmp_path / "runs" / "pocket-lora-r4" / "adapter").config.rank == 4


# evaluate.py --------------------------------------------------------------------------------------


def test_a_run_is_scored_as_at_its_end(here: Path, capfd: Any) -> None:
    assert call(evaluate_main, "../run", "--output", "new/e.json") == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "the largest differences" in out
    assert "4 dialogues, test split of" in out
    own = json.loads((here.parent / "run" / "evaluation.json").read_text())
    assert json.loads(Path("new/e.json").read_text()) == own
    assert list(own)[:5] == ["data", "split", "n", "base", "finetuned"]
    keys = {"id", "dialogue", "reference", "base", "finetuned"}
    assert all(example.keys() >= keys for example in own["examples"])


def test_the_adapter_inside_a_run_is_scored_with_the_runs_settings(here: Path) -> None:
    assert call(evaluate_main, "../run/adapter", "--output", "e.json") == 0
    own = json.loads((here.parent / "run" / "evaluation.json").read_text())
    assert json.loads(Path("e.json").read_text()) == own


def test_a_run_is_found_however_its_adapter_is_spelt(
    here: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("latest").symlink_to("../run/adapter")
    for where, spelt in ((".", "latest"), ("../run/adapter", "."), ("../data", "../run/./adapter")):
        monkeypatch.chdir(here / where)
        assert call(evaluate_main, spelt, "--output", here / "scores.json") == 0
        assert json.loads((here / "scores.json").read_text())["n"] == 4  # the test split of `data`


def test_scores_replace_scores_and_nothing_else(here: Path, capfd: Any) -> None:
    shutil.copy("../data/test.jsonl", "copy.jsonl")
    write(here / "list.json", b"[]")
    for name in ("copy.jsonl", "list.json", "../run/config.json", "../run/report.html"):
        argv: list[object] = ["../run", "--data", "copy.jsonl", "--output", name]
        refused(evaluate_main, here, capfd, argv, f"--output {name} exists and holds no scores")
    write(here / "scores.json", b"")  # as mktemp makes it
    Path("link.json").symlink_to("scores.json")
    Path("new.json").symlink_to("nothing-yet.json")
    for name in ("scores.json", "scores.json", "link.json", "new.json"):
        assert call(evaluate_main, "../run", "--limit", "2", "--output", name) == 0
    assert Path("link.json").is_symlink()
    assert Path("new.json").is_symlink()
    for name in ("scores.json", "nothing-yet.json"):
        assert json.loads(Path(name).read_text())["n"] == 2
    os.mkfifo("pipe")
    capfd.readouterr()
    for name in ("pipe", "/dev/null"):
        argv = ["../run", "--output", name]
        refused(evaluate_main, here, capfd, argv, f"{name} is not a regular file")


def test_scores_are_printed_before_they_are_written(
    here: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(commands, "write_json", full)
    for main, argv, advice in (
        (evaluate_main, ["../run", "--output", "s.json"], "cannot write to s.json"),
        (train_main, [*BASE, "--output", "new"], "then run: python train.py --resume new"),
    ):
        assert call(main, *argv) == 2
        out, err = capfd.readouterr()
        assert re.search(r"(?m)^rouge1 +\d", out)
        assert err.count("\n") == 1
        assert "(No space left on device): " in err
        assert advice in err
    monkeypatch.undo()
    assert call(train_main, "--resume", here / "new") == 0
    assert (here / "new" / "evaluation.json").exists()


def test_an_adapter_in_the_folder_of_its_base_belongs_to_no_run(here: Path) -> None:
    shutil.copytree("../run/adapter", "../bart/adapter")
    assert call(evaluate_main, "../bart/adapter", "--data", "../data", "--output", "e.json") == 0
    own = json.loads((here.parent / "run" / "evaluation.json").read_text())
    found = json.loads(Path("e.json").read_text())
    assert found["generation"] != own["generation"]  # the preset's
    assert found["finetuned"] != found["base"]


def test_a_bare_adapter_is_scored_with_the_presets_settings(here: Path) -> None:
    shutil.copytree("../run/adapter", "bare")
    argv = ["bare", "--data", "../data", "--model", "../bart", "--output", "e.json"]
    assert call(evaluate_main, *argv) == 0
    found = json.loads(Path("e.json").read_text())
    assert found["n"] == 4
    assert found["generation"]["beams"] == 4
    own = json.loads((here.parent / "run" / "evaluation.json").read_text())
    assert own["generation"]["beams"] == 1
    assert call(evaluate_main, *argv[:3], "--output", "f.json") == 0  # it names its base
    assert Path("f.json").read_bytes() == Path("e.json").read_bytes()


@pytest.mark.parametrize(
    ("flags", "split", "n"),
    [
        (["--split", "validation"], "validation", 3),
        (["--limit", "2"], "test", 2),
        (["--split", "train", "--limit", "5"], "train", 5),
        (["--data", "../data/validation.jsonl"], "all", 3),
    ],
)
def test_what_is_scored_can_be_chosen(here: Path, flags: list[str], split: str, n: int) -> None:
    assert call(evaluate_main, "../run", *flags, "--output", "e.json") == 0
    found = json.loads(Path("e.json").read_text())
    assert (found["split"], found["n"]) == (split, n)


def test_a_text_is_summarized_without_and_with_the_fine_tuning(
    here: Path, capfd: Any, monkeypatch: Any
) -> None:
    text = "Ann: shall we meet at school?\r\nBob: ok"
    write(here / "chat.txt", b"\xef\xbb\xbf" + text.encode() + b"\n\n")
    assert call(evaluate_main, "../run", "--text", "chat.txt", "--base") == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert re.fullmatch(r"base        .*\nfine-tuned  .*\n", out)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert call(evaluate_main, "../run", "--text", "-", "--base") == 0
    assert capfd.readouterr().out == out
    write(here / "two.txt", b"Bob: hello\n---\nAnn: hi\n")
    assert call(evaluate_main, "../run", "--text", "chat.txt", "--text", "two.txt") == 0
    three = capfd.readouterr().out.split("\n---\n")
    assert len(three) == 3
    assert f"fine-tuned  {three[0]}" == out.splitlines()[1]
    write(here / "chat.txt", text.encode() * 9)
    assert call(evaluate_main, "../run", "--text", "chat.txt") == 0
    assert capfd.readouterr().err == (
        "note: 1 of 1 dialogues cut to --max-source-length or the model's positions (64 tokens)\n"
    )


def test_a_summary_cannot_harm_a_terminal_or_fail_on_its_alphabet(
    here: Path, capfd: Any, monkeypatch: Any
) -> None:
    write(here / "chat.txt", b"Ann: hello")
    said = iter(["\x1b[2J caf\u00e9 \U0001f602", "\n "])

    def summarize(*_: object) -> list[Summary]:
        return [Summary(next(said), 3)]

    monkeypatch.setattr(commands, "summarize", summarize)
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert call(evaluate_main, "../run", "--text", "chat.txt", "--base") == 0
    out.seek(0)
    assert out.read() == "base        (empty)\nfine-tuned  [2J caf? ?\n"


def tamper(key: str, new: str | None) -> Callable[[Path], None]:
    """Rename one of the adapter's modules."""

    def act(directory: Path) -> None:
        adapter = minilora.read_adapter(directory)
        shutil.rmtree(directory)
        tensors = {k.replace(key, new or key): v for k, v in adapter.tensors.items()}
        minilora.write_adapter(minilora.Adapter(adapter.config, tensors), directory)

    return act


BAD_EVALUATIONS: dict[str, tuple[list[str], list[str]]] = {
    "no such run": (["nothing"], ["nothing: no such directory"]),
    "no run": (["../data"], ["../data is not a run"]),
    "no argument": ([], ["RUN"]),
    "shapes of another model": (
        ["../other/adapter", "--model", "../bart"],
        ["q_proj.lora_A.weight is a torch.float32 tensor of shape (8, 32), not", "shape (8, 16)"],
    ),
    "keys of another model": (
        ["../other/adapter", "--model", "../bart"],
        ["unexpected key base_model.model.model.encoder.layers.1.self_attn", "no such module"],
    ),
    "no such text": (["../run", "--text", "nothing.txt"], ["nothing.txt: no such file"]),
    "a text that is a directory": (
        ["../run", "--text", "../data"],
        ["../data: cannot be read (Is"],
    ),
    "a text that is none": (["../run", "--text", "../bart/model.safetensors"], ["not UTF-8"]),
    "an empty text": (["../run", "--text", "/dev/null"], ["nothing to summarize"]),
    "a text of spaces": (["../run", "--text", "../blank.txt"], ["nothing to summarize"]),
    "a text in Latin-1": (
        ["../run", "--text", "../latin.txt"],
        ["not UTF-8 (byte 0xe9 at offset 8)"],
    ),
    "a text and a file for scores": (["../run", "--text", "x", "--output", "y"], ["--output"]),
    "a file for summaries that exists": (
        ["../run", "--predict", "../none.jsonl", "--output", "../blank.txt"],
        ["--output ../blank.txt exists already: name another file"],
    ),
    "a table for the summaries": (
        ["../run", "--predict", "../none.jsonl", "--output", "../out.csv"],
        ["--output ../out.csv: the summaries are JSON Lines: name a .jsonl file"],
    ),
    "a negative limit": (["../run", "--limit", "-1"], ["--limit"]),
    "no such split": (["../run", "--split", "dev"], ["--split", "'dev'"]),
    "no such data": (["../run", "--data", "../dtaa"], ["../dtaa: no such file"]),
    "a directory for the scores": (["../run", "--output", ".."], ["--output .. is a directory"]),
    "a misspelt flag": (["../run", "--splt", "test"], ["--splt", "nearest: --split"]),
    "no such device": (["../run", "--device", "gpu"], ["--device gpu"]),
    "no such model": (["../run", "--model", "./none"], ["model ./none: no such directory"]),
}


@pytest.mark.parametrize(("argv", "says"), BAD_EVALUATIONS.values(), ids=BAD_EVALUATIONS)
def test_bad_evaluations(here: Path, capfd: Any, argv: list[object], says: list[str]) -> None:
    refused(evaluate_main, here, capfd, argv, *says)


def test_an_adapter_whose_keys_are_others(here: Path, capfd: Any) -> None:
    tamper("q_proj", "q_porj")(here.parent / "run" / "adapter")
    argv: list[object] = ["../run"]
    refused(evaluate_main, here, capfd, argv, "q_porj", "nearest: ", "self_attn.q_proj")


def test_a_run_without_an_adapter_yet(here: Path, capfd: Any) -> None:
    shutil.rmtree(here.parent / "run" / "adapter")
    says = "../run has no adapter yet: continue with python train.py --resume ../run"
    refused(evaluate_main, here, capfd, ["../run", "--text", "../latin.txt"], says)


# Through the shell --------------------------------------------------------------------------------


def shell(*argv: object, **more: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        **more,
    )


@pytest.mark.slow
def test_a_process_that_is_told_to_stop_says_how_to_go_on_and_does(here: Path) -> None:
    many = ["--epochs", "2000", "--no-evaluate", "--checkpoint-minutes", "60"]
    process = shell(ROOT / "train.py", *BASE, *many, "--output", "long")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1/2000"):
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == ""
    command = re.search(r"resume with: python \S*(train\.py --resume long)\n", out)
    assert command, out
    assert minilora.read_adapter("long/adapter").modules
    step = json.loads(sorted(Path("long/checkpoints").glob("*/state.json"))[-1].read_text())
    assert step["progress"]["step"] >= 4
    process = shell(ROOT / "train.py", *command[1].split()[1:])
    assert process.stdout is not None
    assert "20 dialogues to train" in process.stdout.readline()
    for line in process.stdout:
        if line.startswith("epoch "):
            assert int(re.findall(r"\d+", line)[0]) >= 2  # the first is behind it
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


@pytest.mark.slow
def test_bad_input_ends_in_one_line_and_exit_code_2_in_a_shell_too(here: Path) -> None:
    process = shell(ROOT / "train.py", *BASE, "--targets", "q_porj")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.count("\n") == 1
    assert "nearest: q_proj" in err
    assert list(here.iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_while_transformers_is_imported_shows_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transformers that presses Ctrl-C, and would then import for a minute."""
    press = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    write(tmp_path / "transformers" / "__init__.py", press.encode())
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    for argv in (["train.py"], ["evaluate.py", "run"]):
        process = shell(ROOT / argv[0], *argv[1:], cwd=tmp_path)
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode in (-signal.SIGINT, 130)  # a shell says 130 of both
