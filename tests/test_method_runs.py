"""AdaLoRA, PiSSA and LoRA+ from the command line: trained, stopped, resumed, scored, merged."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import minilora
from minilora.__main__ import main
from minilora.methods import AdaLoRAConfig
from minilora.summarization.cli import evaluate_main, train_main
from minilora.summarization.flags import parse_run
from minilora.summarization.presets import LEARNING_RATES
from minilora.summarization.report.runs import read_report
from minilora.summarization.training import trainer as trainer_module
from minilora.summarization.training.session import open_session
from minilora.summarization.training.trainer import Trainer
from tests.helpers import SMALL, records, save_bart, save_data
from tests.test_training import Crash, at_step, check_same, crash, interrupt

METHODS = {
    "adalora": ["--method", "adalora", "--learning-rate", "0.1"],  # lambda starts at zero
    "pissa": ["--init", "pissa"],
    "lora_plus": ["--lora-plus-ratio", "4"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    save_bart(folder / "bart")
    save_data(folder / "data")
    return folder


def flags(folder: Path, *more: object) -> list[str]:
    base = ["--model", str(folder / "bart"), "--data", str(folder / "data"), *SMALL]
    return [*base, "--rank", "3", *map(str, more)]


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Path]:
    """Whole runs of eight steps."""
    for name, method in METHODS.items():
        assert train_main(flags(folder, *method, "--output", folder / name)) == 0
    return {name: folder / name for name in METHODS}


@pytest.mark.parametrize("step", [2, 5, 8])
@pytest.mark.parametrize("name", METHODS)
def test_stopped_and_resumed_it_ends_with_the_same_bits(
    folder: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: Any, name: str, step: int
) -> None:
    """AdaLoRA's sensitivities, its number of steps and PiSSA's start are there again."""
    at_step(monkeypatch, step, lambda: interrupt(signal.SIGINT))
    run = tmp_path / "run"
    assert train_main(flags(folder, *METHODS[name], "--output", run)) == 130
    assert train_main(["--resume", str(run)]) == 0
    check_same(run, runs[name])


def test_adalora_keeps_the_steps_that_its_ranks_are_planned_for(
    folder: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    at_step(monkeypatch, 6, interrupt)
    run = tmp_path / "run"
    argv = flags(folder, *METHODS["adalora"], "--no-evaluate", "--output", run)
    assert train_main(argv) == 130
    capfd.readouterr()
    assert train_main(["--resume", str(run), "--accumulate", "1", "--accept-changes"]) == 2
    says = "--method adalora plans its ranks for 14 steps, and with these batches the run takes 13"
    assert says in capfd.readouterr().err
    assert train_main(["--resume", str(run), "--epochs", "3", "--accept-changes"]) == 0
    assert [record["kind"] for record in records(run)].count("step") == 12


def test_a_crash_costs_nothing_of_the_allocation(
    folder: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    at_step(monkeypatch, 7, crash)
    run = tmp_path / "run"
    often = [*METHODS["adalora"], "--checkpoint-steps", "1", "--output", run]
    with pytest.raises(Crash):
        train_main(flags(folder, *often))
    (newest, *_) = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    kept = load_file(newest / "state.safetensors")
    counts = {int(t) for key, t in kept.items() if key.startswith("optimizer.allocation_steps.")}
    assert counts == {6}
    assert sum(key.startswith("optimizer.uncertainty.") for key in kept) == 3 * len(
        minilora.read_adapter(run / "adapter").modules
    )
    assert train_main(["--resume", str(run)]) == 0
    assert adapter(run) == adapter(runs["adalora"])


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("name", METHODS)
def test_it_is_scored_again_as_at_its_end(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    out = tmp_path / "scores.json"
    assert evaluate_main([str(runs[name]), "--output", str(out)]) == 0
    again = json.loads(out.read_text())
    before = json.loads((runs[name] / "evaluation.json").read_text())
    assert again == before
    texts = [(one["base"], one["finetuned"]) for one in again["examples"]]
    assert any(base != tuned for base, tuned in texts)


@pytest.mark.parametrize("name", METHODS)
def test_it_is_merged_and_inspected(
    folder: Path, runs: dict[str, Path], tmp_path: Path, capsys: Any, name: str
) -> None:
    assert main(["merge", str(runs[name]), str(tmp_path / "merged")]) == 0
    assert "on a sample the checkpoint's outputs" in capsys.readouterr().out
    assert main(["inspect", str(runs[name])]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("AdaLoRA" if name == "adalora" else "LoRA")


def test_the_ranks_are_those_of_the_budget(folder: Path, tmp_path: Path) -> None:
    """--rank 3 is the mean in the end; training begins with 5, and with LoRA's scale."""
    trainer = Trainer(open_session(parse_run(flags(folder, *METHODS["adalora"]))), tmp_path)
    config = minilora.config_of(trainer.session.model)
    assert isinstance(config, AdaLoRAConfig)
    assert (config.rank, config.target_rank, config.total_steps) == (5, 3, 8)
    layers = [m for m in trainer.session.model.modules() if isinstance(m, minilora.LoRALinear)]
    assert layers[0].scale == pytest.approx(32 / 3)
    assert (config.initial_steps, config.final_steps) == (3, 2)
    chosen = []
    for _ in range(2):
        for group in trainer.groups():
            trainer.step(group)
            trainer.progress.step += 1
            chosen.append(sum(int(layer.lora_E.count_nonzero()) for layer in layers))
        trainer.progress.epoch += 1
    assert chosen == [config.budget(step, len(layers)) for step in range(1, 9)]
    assert chosen[:3] == [5 * len(layers)] * 3
    assert chosen[-3:] == [3 * len(layers)] * 3


@pytest.mark.parametrize("beside", [[], ["--with", "prompt"]])
def test_an_epoch_with_the_final_ranks_beats_a_better_one_without(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: list[str]
) -> None:
    """Else --rank would be exceeded in silence. Four epochs of four steps: final from step 11."""
    scores = iter([9.0, 8.0, 5.0, 4.0])

    def validate(_: object) -> dict[str, float]:
        return {"loss": 1.0, **dict.fromkeys(("rouge1", "rouge2", "rougeL"), next(scores))}

    monkeypatch.setattr(trainer_module, "validate", validate)
    more = [*METHODS["adalora"], *beside, "--epochs", "4", "--no-evaluate", "--no-report"]
    assert train_main(flags(folder, *more, "--output", tmp_path / "run")) == 0
    kept = read_report(tmp_path / "run")
    assert kept.best is not None
    assert (kept.best["epoch"], kept.best["rouge1"]) == (3, 5.0)
    assert sum(kept.ranks.values()) == 3 * len(kept.ranks)
    assert [record["best"] for record in kept.validations] == [True, False, True, False]


def test_b_has_the_rate_that_the_ratio_says(
    folder: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    run = parse_run(flags(folder, *METHODS["lora_plus"]))
    trainer = Trainer(open_session(run), tmp_path)
    for step in range(8):
        trainer.progress.step = step
        trainer.set_learning_rate()
        slow, fast = (group["lr"] for group in trainer.optimizer.param_groups)
        assert fast == pytest.approx(4 * slow)
        assert slow == records(runs["lora_plus"])[step + 1 + (step >= 4)]["learning_rate"]


def test_what_was_saved_of_pissa_is_lora_of_twice_the_rank(runs: dict[str, Path]) -> None:
    config = minilora.read_adapter(runs["pissa"] / "adapter").config
    assert (config.rank, config.alpha, config.init) == (6, 64, "kaiming")


@pytest.mark.parametrize(
    ("flags_", "says"),
    [
        (["--init", "pissa", "--method", "qlora"], "--init pissa requires --method lora"),
        (["--init", "pissa", "--method", "adalora"], "--init pissa requires --method lora"),
        (["--init", "gaussian", "--method", "adalora"], "init 'gaussian' does not go with AdaLoRA"),
        (["--rslora", "--method", "adalora"], "rslora does not go with AdaLoRA"),
        (["--rank", "12", "--method", "adalora"], "rank 18 is above the smaller side"),
        (["--lora-plus-ratio", "0"], "--lora-plus-ratio must be above 0, not 0"),
        (
            ["--lora-plus-ratio", "4", "--method", "full"],
            "--lora-plus-ratio requires --method lora",
        ),
    ],
)
def test_what_makes_no_sense_ends_in_one_line(
    folder: Path, tmp_path: Path, capsys: Any, flags_: list[str], says: str
) -> None:
    run = tmp_path / "run"
    assert train_main([*flags(folder), *flags_, "--output", str(run)]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not run.exists()


@pytest.mark.parametrize(
    ("flags_", "rate"),
    [
        (["--method", "adalora"], LEARNING_RATES["pocket"]["adalora"]),
        (["--method", "adalora", "--preset", "bart-base-samsum"], 5e-4),  # LoRA's
        (["--init", "pissa"], LEARNING_RATES["pocket"]["lora"]),
        # And B sixteen times that: their geometric mean is LoRA's.
        (["--lora-plus-ratio", "16"], LEARNING_RATES["pocket"]["lora"] / 4),
        (["--lora-plus-ratio", "16", "--learning-rate", "0.5"], 0.5),
    ],
)
def test_each_method_has_a_rate(flags_: list[str], rate: float) -> None:
    assert parse_run(flags_).training.learning_rate == rate


def test_no_run_starts_from_adalora(
    folder: Path, runs: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    start = ["--adapter", str(runs["adalora"]), "--data", str(folder / "data")]
    assert train_main([*start, "--output", str(tmp_path / "run")]) == 2
    assert "is AdaLoRA: convert it with minilora.methods.as_lora" in capsys.readouterr().err
