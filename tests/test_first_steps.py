"""What train.py says of its first steps: nothing wrong in one line, else what and where."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import minilora
from minilora import LoRAConfig
from minilora.summarization.cli import train_main
from minilora.summarization.training import first_steps
from minilora.summarization.training.first_steps import FirstSteps
from minilora.summarization.training.trainer import Trainer
from tests.helpers import SMALL, records, save_bart, save_data

# r 3 in q_proj and v_proj of three attentions: A and B each
RIGHT = "first 3 steps: 12 tensors train, all entries of each changed; the base is"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first_steps")
    save_bart(folder / "bart")
    save_data(folder / "data")
    return folder


def train(folder: Path, output: Path, *more: object) -> None:
    argv = ["--model", folder / "bart", "--data", folder / "data", *SMALL, "--rank", 3]
    argv += ["--output", output, "--no-evaluate", *more]
    assert train_main(list(map(str, argv))) == 0


def checks(run: Path) -> list[dict[str, Any]]:
    return [record for record in records(run) if record["kind"] == "check"]


def test_steps_that_are_right_take_one_line(folder: Path, tmp_path: Path, capfd: Any) -> None:
    train(folder, tmp_path)
    out, err = capfd.readouterr()
    assert [line.startswith(RIGHT) for line in out.splitlines() if "steps:" in line] == [True]
    assert err == ""
    assert checks(tmp_path) == []


@pytest.mark.parametrize("more", [("--max-steps", 2), ("--method", "full")])
def test_fewer_steps_and_a_full_fine_tune_are_not_checked(
    folder: Path, tmp_path: Path, capfd: Any, more: tuple[object, ...]
) -> None:
    train(folder, tmp_path, *more)
    out, err = capfd.readouterr()
    assert "steps:" not in out
    assert [line for line in err.splitlines() if "does not use" not in line] == []


def base_moves(trainer: Trainer) -> None:
    trainer.session.model.model.encoder.layernorm_embedding.bias.data[3] += 1e-3


def adapter_forgotten(trainer: Trainer) -> None:
    (group,) = trainer.optimizer.param_groups
    group["params"] = group["params"][1:]


FAULTS = {
    base_moves: "the base changed: model.encoder.layernorm_embedding.bias",
    adapter_forgotten: "not in the optimizer: model.encoder.layers.0.self_attn.",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_logged(
    fault: Any, folder: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def faulty(trainer: Trainer, group: Any) -> dict[str, Any]:
        measures = step(trainer, group)
        if trainer.progress.step == 0:
            fault(trainer)
        return measures

    monkeypatch.setattr(Trainer, "step", faulty)
    train(folder, tmp_path)
    out, err = capfd.readouterr()
    assert f"note: in the first 3 steps, {FAULTS[fault]}" in err
    assert "steps:" not in out
    (check,) = checks(tmp_path)
    assert check["step"] == 3
    assert [f"note: {problem}" for problem in check["problems"]] == err.splitlines()


def test_steps_that_overflow_are_not_counted() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    minilora.inject(model, LoRAConfig(rank=2, targets=("q_proj",)))
    optimizer = torch.optim.SGD(minilora.trainable_parameters(model), lr=0.1)
    check = FirstSteps(model, optimizer, wanted=True)
    found = []
    for norm in (math.inf, math.nan, 1.0, 1.0, 1.0, 1.0):
        if math.isfinite(norm):
            model["q_proj"](torch.ones(8)).sum().backward()
            optimizer.step()
        found.append(check.after(norm))
    assert [report is not None for report in found] == [False] * 4 + [True, False]
    assert found[4] is not None
    assert first_steps.problems(found[4]) == []


def test_what_got_no_gradient_is_named_once() -> None:
    model = nn.ModuleDict({f"{i}.proj".replace(".", "_"): nn.Linear(8, 8) for i in range(2)})
    minilora.inject(model, LoRAConfig(rank=2, targets=("0_proj", "1_proj")))
    optimizer = torch.optim.SGD(minilora.trainable_parameters(model), lr=0.1)
    check = FirstSteps(model, optimizer, wanted=True)
    for _ in range(3):
        model["0_proj"](torch.ones(8)).sum().backward()
        optimizer.step()
        report = check.after(1.0)
    assert report is not None
    report.no_gradient += ("0_proj.lora_A",)  # as of an expert that was reached once
    assert first_steps.problems(report) == [
        "in the first 3 steps, no gradient: 1_proj.lora_A, 1_proj.lora_B"
    ]
