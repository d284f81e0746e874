"""The loop: what an optimizer step computes, what is kept, and what a stop leaves behind."""

import json
import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM

import minilora
from minilora.summarization.cli import evaluate_main, train_main
from minilora.summarization.data.batches import Encoded
from minilora.summarization.errors import UserError
from minilora.summarization.evaluation import generate
from minilora.summarization.flags import parse_run
from minilora.summarization.settings import RunConfig
from minilora.summarization.training import schedule, trainer, validation
from minilora.summarization.training.log import open_log
from minilora.summarization.training.schedule import last_step, learning_rate
from minilora.summarization.training.session import Session, open_session
from minilora.summarization.training.stopping import stop_requests
from minilora.summarization.training.trainer import Trainer, fit
from tests.helpers import SMALL, records, save_bart, save_data, small_bart


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    save_bart(folder / "bart")
    save_data(folder / "data")
    return folder


def flags(folder: Path, *more: object) -> list[str]:
    base = ["--model", str(folder / "bart"), "--data", str(folder / "data"), *SMALL]
    return [*base, "--rank", "3", *map(str, more)]


def session_for(folder: Path, *more: object) -> Session:
    return open_session(parse_run(flags(folder, "--no-evaluate", *more)))


def trainer_for(folder: Path, output: Path, *more: object) -> Trainer:
    return Trainer(session_for(folder, *more), output)


def randomize(model: nn.Module, seed: int = 1) -> None:
    """Fill A and B: at B = 0 much is equal that should not be."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=draw)


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


# A step -------------------------------------------------------------------------------------------


def gradients_of(trainer: Trainer, group: list[list[Encoded]]) -> tuple[float, list[torch.Tensor]]:
    """Without clipping and dropout (the model's own and the adapter's) and with B random."""
    randomize(trainer.session.model)
    for module in trainer.session.model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    loss = trainer.step(group)["loss"]
    return loss, [parameter.grad.clone() for parameter in trainer.parameters]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_accumulating_equals_one_large_batch(folder: Path, tmp_path: Path, method: str) -> None:
    """By the sum over target tokens; the mean of the batches' means is something else."""
    more = ("--method", method, "--clip", 0)
    first = trainer_for(folder, tmp_path / "a", *more)
    rows = sorted(first.session.splits["train"].encoded, key=lambda row: len(row.target))
    rows = [rows[0], rows[-1], rows[1], rows[7], rows[-2]]
    loss, whole = gradients_of(first, [rows])
    apart_loss, apart = gradients_of(
        trainer_for(folder, tmp_path / "b", *more), [rows[:1], rows[1:4], rows[4:]]
    )
    assert len({len(row.target) for row in rows}) > 1
    assert apart_loss == pytest.approx(loss, rel=1e-6)
    assert max(gradient.abs().max().item() for gradient in whole) > 1e-3
    for one, other in zip(whole, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_that_of_transformers_mean_loss(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_for(folder, tmp_path, "--clip", 0)
    rows = trainer.session.splits["train"].encoded[:4]
    reference = trainer_for(folder, tmp_path / "other").session.model
    loss, found = gradients_of(trainer, [rows[:3], rows[3:]])
    randomize(reference)
    own = reference.eval()(**trainer.session.tensors(rows), use_cache=False).loss
    own.backward()
    assert own.item() == pytest.approx(loss, rel=1e-6)
    # training sums in another order than evaluation, 6e-8 a rounding, in all layers above
    for gradient, parameter in zip(found, minilora.trainable_parameters(reference), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=5e-6)


def norm_of(trainer: Trainer) -> float:
    return math.sqrt(sum(p.grad.square().sum().item() for p in trainer.parameters))


def test_clipping_limits_the_norm_and_reports_what_it_was(folder: Path, tmp_path: Path) -> None:
    norms = {}
    for clip in (0, 0.01, 1e6):
        trainer = trainer_for(folder, tmp_path / str(clip), "--clip", clip)
        measures = trainer.step([trainer.session.splits["train"].encoded[:3]])
        norms[clip] = (measures["gradient_norm"], norm_of(trainer))
    assert norms[0][0] > 0.1
    assert norms[0] == norms[1e6] == pytest.approx((norms[0][0], norms[0][0]), rel=1e-5)
    assert norms[0.01] == pytest.approx((norms[0][0], 0.01), rel=1e-4)


def test_only_the_adapter_moves(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_for(folder, tmp_path)
    before = {n: p.detach().clone() for n, p in trainer.session.model.named_parameters()}
    rows = trainer.session.splits["train"].encoded
    trainer.step([rows[:3]])
    trainer.step([rows[3:6]])
    moved = {
        name
        for name, parameter in trainer.session.model.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    assert moved == {name for name in before if name.endswith(("lora_A", "lora_B"))}


def test_fp16_scales_the_loss_and_skips_a_step_that_overflows(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_for(folder, tmp_path, "--precision", "fp16")
    rows = [trainer.session.splits["train"].encoded[:3]]
    assert trainer.scaler.is_enabled()
    other = trainer_for(folder, tmp_path / "exact")
    torch.manual_seed(0)
    exact = other.step(rows)
    torch.manual_seed(0)  # the same dropout
    measures = trainer.step(rows)
    assert measures["gradient_norm"] == pytest.approx(exact["gradient_norm"], rel=0.1)
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    measures = trainer.step(rows)
    assert not math.isfinite(measures["gradient_norm"])
    assert math.isfinite(measures["loss"])
    assert all(map(torch.equal, trainer.parameters, before))
    assert trainer.scaler.get_scale() == 2.0**119
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    trainer.step(rows)
    assert not all(map(torch.equal, trainer.parameters, before))


def test_a_loss_that_is_not_finite_names_step_and_dialogues(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_for(folder, tmp_path)
    rows = trainer.session.splits["train"].encoded
    trainer.progress.step = 6
    trainer.session.model.get_input_embeddings().weight.data[rows[4].source[1]] = math.nan
    with pytest.raises(UserError, match=r"loss is nan in step 7, on the dialogues d3, d4:"):
        trainer.step([rows[3:5]])


def test_a_gradient_that_is_not_finite_names_step_and_dialogues(
    folder: Path, tmp_path: Path
) -> None:
    trainer = trainer_for(folder, tmp_path)
    rows = trainer.session.splits["train"].encoded
    trainer.parameters[0].register_hook(lambda gradient: gradient * math.inf)
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    with pytest.raises(UserError, match=r"norm is (nan|inf) in step 1, on the dialogues d3, d4:"):
        trainer.step([rows[3:4], rows[4:5]])
    assert all(map(torch.equal, trainer.parameters, before))


# The schedule -------------------------------------------------------------------------------------


def test_the_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    assert [learning_rate(step, 8, 2, 1.0) for step in range(9)] == pytest.approx(
        [0.5, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0]
    )
    for last in range(1, 30):
        for warmup in range(1, last + 1):
            rates = [learning_rate(step, last, warmup, 2.0) for step in range(last)]
            assert max(rates) == 2.0
            assert min(rates) > 0
            assert rates[:warmup] == sorted(rates[:warmup])
            assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


@pytest.mark.parametrize(
    ("rows", "batch", "accumulate", "epochs", "max_steps", "wanted"),
    [
        (20, 3, 2, 2, 0, 8),
        (18, 3, 2, 2, 0, 6),
        (1, 3, 2, 2, 0, 2),
        (20, 3, 2, 2, 5, 5),
        (20, 3, 2, 2, 99, 8),
        (20, 1, 1, 1, 0, 20),
        (20, 50, 50, 3, 0, 3),
    ],
)
def test_the_number_of_steps_is_that_of_the_groups(
    folder: Path, rows: int, batch: int, accumulate: int, epochs: int, max_steps: int, wanted: int
) -> None:
    run = parse_run(
        flags(folder, "--batch-size", batch, "--accumulate", accumulate, "--epochs", epochs)
    )
    run.training.max_steps = max_steps
    assert last_step(run.training, rows) == wanted


def test_every_row_is_in_one_group_of_the_epoch(folder: Path) -> None:
    session = session_for(folder)
    train, options = session.splits["train"].encoded, session.run.training
    for epoch in (0, 1):
        groups = schedule.epoch_groups(train, options, 0, epoch)
        assert [len(group) for group in groups] == [2, 2, 2, 1]
        rows = [row.id for group in groups for batch in group for row in batch]
        assert sorted(rows) == sorted(row.id for row in train)
    assert schedule.epoch_groups(train, options, 0, 0) != groups


# A run --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run that nothing interrupts: two epochs of four steps."""
    output = folder / "whole"
    assert train_main(flags(folder, "--output", output)) == 0
    return output


def test_a_run_writes_what_it_says(whole: Path) -> None:
    found = records(whole)
    kinds = [record["kind"] for record in found]
    assert kinds == ["start", *["step"] * 4, "validation", *["step"] * 4, "validation", "end"]
    steps = [record for record in found if record["kind"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, 9))
    assert [record["epoch"] for record in steps] == [1] * 4 + [2] * 4
    assert steps[0]["learning_rate"] == 0.02
    assert all(math.isfinite(record["loss"]) for record in steps)
    base = small_bart().num_parameters()
    assert found[0] == {"kind": "start", "trainable": 6 * 2 * 3 * 16, "total": base + 576}
    validation = next(record for record in found if record["kind"] == "validation")
    assert validation.keys() >= {"loss", "rouge1", "rouge2", "rougeL", "rougeLsum", "step", "epoch"}
    assert sorted(path.name for path in whole.iterdir()) == [
        *("adapter", "checkpoints", "config.json", "evaluation.json", "log.jsonl", "report.html"),
    ]
    assert json.loads((whole / "config.json").read_text())["learning_rate"] == 0.02


def test_the_loss_falls(folder: Path, tmp_path: Path) -> None:
    session = session_for(folder, "--method", "full", "--epochs", 6)
    fit(session, tmp_path)
    losses = [record["loss"] for record in records(tmp_path) if record["kind"] == "validation"]
    assert losses[-1] < 0.8 * losses[0]


def test_the_same_seed_gives_the_same_run_and_another_does_not(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    assert train_main(flags(folder, "--output", tmp_path / "same")) == 0
    assert train_main(flags(folder, "--output", tmp_path / "other", "--seed", 1)) == 0
    assert adapter(tmp_path / "same") == adapter(whole)
    assert records(tmp_path / "same") == records(whole)
    assert adapter(tmp_path / "other") != adapter(whole)


def test_attention_is_query_and_value_in_the_files_too(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    """`--targets attention`, which is the default, and the same names typed."""
    assert RunConfig().adapter.targets == ["attention"]
    assert train_main(flags(folder, "--output", tmp_path, "--targets", "attention")) == 0
    assert adapter(tmp_path) == adapter(whole)
    name = "adapter/adapter_config.json"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert json.loads((whole / name).read_text())["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(folder: Path, whole: Path, tmp_path: Path, precision: str) -> None:
    argv = flags(folder, "--output", tmp_path / "run", "--precision", precision)
    assert train_main(argv) == 0
    losses = [r["loss"] for r in records(tmp_path / "run") if r["kind"] == "step"]
    exact = [r["loss"] for r in records(whole) if r["kind"] == "step"]
    assert losses == pytest.approx(exact, rel=0.05)
    assert losses != exact


def test_max_steps_ends_in_mid_epoch_with_a_validation(folder: Path, tmp_path: Path) -> None:
    argv = flags(folder, "--output", tmp_path, "--max-steps", 6, "--no-evaluate")
    assert train_main(argv) == 0
    found = records(tmp_path)
    kinds = [record["kind"] for record in found]
    assert kinds == ["start", *["step"] * 4, "validation", *["step"] * 2, "validation", "end"]
    assert found[-3]["learning_rate"] == pytest.approx(0.02 / 5)  # the schedule ends there too
    assert train_main(["--resume", str(tmp_path)]) == 0
    assert records(tmp_path) == found


def test_scores_of_an_earlier_adapter_are_removed(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_for(folder, tmp_path)
    (tmp_path / "evaluation.json").touch()
    trainer.save_trained()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_best_adapter_is_kept_not_the_last(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, seen = [5.0, 9.0, 7.0, 9.0], []

    def validate(session: Session) -> dict[str, float]:
        seen.append(minilora.peft_format.apply.adapter_of(session.model).tensors)
        measures = dict.fromkeys(("rouge1", "rouge2", "rougeL"), scores[len(seen) - 1])
        return {"loss": math.inf, **measures}

    monkeypatch.setattr(trainer, "validate", validate)
    outcome = fit(session_for(folder, "--epochs", 4), tmp_path)
    assert outcome.progress.best == 9.0
    kept = minilora.read_adapter(tmp_path / "adapter").tensors
    equal = [all(torch.equal(kept[k], t[k]) for k in kept) for t in seen]
    assert equal == [False, True, False, False]  # of equals the first
    assert records(tmp_path)[-2]["loss"] is None  # JSON has no infinity


def test_validation_counts_tokens_and_changes_nothing(folder: Path) -> None:
    session = session_for(folder)
    randomize(session.model)
    state, before = torch.get_rng_state(), trainer.validate(session)
    assert torch.equal(torch.get_rng_state(), state)
    session.run.generation.evaluation_batch_size = 1
    assert trainer.validate(session)["loss"] == pytest.approx(before["loss"], rel=1e-5)
    session.run.training.validation_limit = 1
    assert trainer.validate(session)["loss"] == pytest.approx(before["loss"], rel=1e-5)


# Full fine-tuning ---------------------------------------------------------------------------------


def test_validation_decodes_with_its_own_beams(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, used = session_for(folder, "--beams", "3", "--validation-beams", "2"), []

    def summarize(*arguments: Any) -> list[Any]:
        used.append(arguments[3].beams)
        return original(*arguments)

    original = generate.summarize
    monkeypatch.setattr(validation, "summarize", summarize)
    trainer.validate(session)
    assert used == [2]
    assert session.run.generation.beams == 3


@pytest.fixture(scope="module")
def full(folder: Path) -> Path:
    output = folder / "full"
    argv = flags(folder, "--output", output, "--method", "full", "--learning-rate", 0.01)
    assert train_main(argv) == 0
    return output


def test_a_full_fine_tune_loads_in_plain_transformers(folder: Path, full: Path) -> None:
    assert not (full / "adapter").exists()
    tuned = AutoModelForSeq2SeqLM.from_pretrained(full / "model").eval()
    base = AutoModelForSeq2SeqLM.from_pretrained(folder / "bart").eval()
    assert not torch.equal(
        tuned.model.encoder.layers[0].fc1.weight, base.model.encoder.layers[0].fc1.weight
    )
    assert tuned.lm_head.weight is tuned.model.shared.weight


def test_a_full_fine_tune_is_compared_with_the_base_read_again(
    folder: Path, full: Path, whole: Path, tmp_path: Path
) -> None:
    own = json.loads((full / "evaluation.json").read_text())
    by_lora = json.loads((whole / "evaluation.json").read_text())
    assert own["base"] == by_lora["base"]
    assert [e["base"] for e in own["examples"]] == [e["base"] for e in by_lora["examples"]]
    assert [e["finetuned"] for e in own["examples"]] != [e["base"] for e in own["examples"]]
    assert evaluate_main([str(full), "--output", str(tmp_path / "e.json")]) == 0
    assert json.loads((tmp_path / "e.json").read_text()) == own


def test_a_full_fine_tune_counts_every_parameter(folder: Path) -> None:
    session = session_for(folder, "--method", "full")
    assert session.report.trainable == session.report.total == session.model.num_parameters()


# Stopping and going on ----------------------------------------------------------------------------


class Crash(Exception):
    """What a kill -9 looks like from outside: nothing is tidied up."""


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Do something in the middle of this optimizer step, once."""
    original, done = Trainer.step, []

    def step(trainer: Trainer, group: Any) -> dict[str, float]:
        if trainer.progress.step + 1 == number and not done:
            done.append(True)
            act()
        return original(trainer, group)

    monkeypatch.setattr(Trainer, "step", step)


def interrupt(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def crash() -> None:
    raise Crash


def check_same(run: Path, whole: Path) -> None:
    assert adapter(run) == adapter(whole)
    assert records(run) == records(whole)
    assert (run / "evaluation.json").read_bytes() == (whole / "evaluation.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 2, 4, 5, 7, 8])
def test_interrupted_in_any_step_it_ends_as_if_it_had_not_been(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, step: int, number: int
) -> None:
    at_step(monkeypatch, step, lambda: interrupt(number))
    run = tmp_path / "a run"
    assert train_main(flags(folder, "--output", run)) == 130
    out = capsys.readouterr().out
    assert f"stopped after step {step}" in out
    assert f"resume with: python train.py --resume '{run}'" in out
    assert minilora.read_adapter(run / "adapter").modules  # a usable one
    assert sum(record["kind"] == "step" for record in records(run)) == step
    assert train_main(["--resume", str(run)]) == 0
    check_same(run, whole)


@pytest.mark.parametrize("epoch", [1, 2])
def test_interrupted_while_validating_it_stops_at_once_and_ends_the_same(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: Any, epoch: int
) -> None:
    original, calls = validation.rouge, []

    def rouge(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == epoch:
            interrupt()
        return original(*arguments)

    monkeypatch.setattr(validation, "rouge", rouge)
    assert train_main(flags(folder, "--output", tmp_path / "run")) == 130
    assert records(tmp_path / "run")[-1]["kind"] == "step"
    assert (tmp_path / "run" / "adapter").is_dir()
    assert train_main(["--resume", str(tmp_path / "run")]) == 0
    check_same(tmp_path / "run", whole)


@pytest.mark.parametrize(("step", "minutes"), [(3, 0), (7, 0), (3, 10), (7, 10)])
def test_crashed_it_goes_on_from_its_last_checkpoint_and_ends_the_same(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: Any, step: int, minutes: int
) -> None:
    """At 0 minutes there is one after every step, at 10 after the first epoch, if that is over."""
    at_step(monkeypatch, step, crash)
    run = tmp_path / "run"
    with pytest.raises(Crash):
        train_main(flags(folder, "--output", run, "--checkpoint-minutes", minutes))
    with (run / "log.jsonl").open("a") as log:
        log.write('{"kind": "step", "st')  # cut off, as a crash leaves it
    steps = [int(path.name[5:13]) for path in sorted((run / "checkpoints").glob("step-*"))]
    assert steps[-1:] == ([step - 1] if minutes == 0 else [4] if step > 4 else [])
    assert train_main(["--resume", str(run)]) == 0
    check_same(run, whole)


def test_interrupted_again_and_again_it_ends_the_same(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    run = tmp_path / "run"
    for step in (2, 3, 6):
        with monkeypatch.context() as patch:
            at_step(patch, step, interrupt)
            argv = flags(folder, "--output", run) if step == 2 else ["--resume", str(run)]
            assert train_main(argv) == 130
    assert train_main(["--resume", str(run)]) == 0
    check_same(run, whole)
    assert train_main(["--resume", str(run)]) == 0  # a finished one has nothing left to do
    check_same(run, whole)


def test_without_the_random_state_a_resumed_run_would_end_otherwise(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """So the tests above do see dropout."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 2, interrupt)
        assert train_main(flags(folder, "--output", run)) == 130
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    assert train_main(["--resume", str(run)]) == 0
    assert adapter(run) != adapter(whole)


OTHER = {
    # flags; the steps of each epoch; what is said
    "fewer steps": (["--max-steps", "5"], [4, 2], "has taken 6 steps, and is asked for 5: it"),
    "fewer epochs": (["--epochs", "1"], [4, 2], "has taken 6 steps, and is asked for 4: it"),
    "more steps": (["--max-steps", "7"], [4, 3], ""),
    "more epochs": (["--epochs", "3"], [4, 4, 4], ""),
    "larger batches": (["--batch-size", "5"], [4, 2 + 2], "epoch 2 begins again, because its"),
    "smaller steps": (["--accumulate", "1"], [4, 2 + 7], "epoch 2 begins again, because its"),
    "another seed": (["--seed", "1"], [4, 2 + 4], "epoch 2 begins again, because its"),
}


@pytest.mark.parametrize(("more", "steps", "says"), OTHER.values(), ids=OTHER)
def test_resumed_in_mid_epoch_with_other_steps_the_rate_falls_to_zero(
    folder: Path,
    tmp_path: Path,
    monkeypatch: Any,
    capfd: Any,
    more: list[str],
    steps: list[int],
    says: str,
) -> None:
    run = tmp_path / "run"
    at_step(monkeypatch, 6, interrupt)
    assert train_main(flags(folder, "--output", run, "--no-evaluate")) == 130
    seen, step = [], Trainer.step

    def note(trainer: Trainer, group: Any) -> dict[str, float]:
        seen.extend(row.id for batch in group for row in batch)
        return step(trainer, group)

    monkeypatch.setattr(Trainer, "step", note)
    capfd.readouterr()
    assert train_main(["--resume", str(run), *more, "--accept-changes"]) == 0
    said = capfd.readouterr().err
    assert says in said
    assert ("note: epoch 2 begins" in said) == ("begins" in says)
    found = [record for record in records(run) if record["kind"] == "step"]
    epochs = [record["epoch"] for record in found]
    assert [epochs.count(epoch) for epoch in sorted(set(epochs))] == steps
    assert [record["step"] for record in found] == list(range(1, sum(steps) + 1))
    assert all(record["learning_rate"] > 0 for record in found)
    left = [record["learning_rate"] for record in reversed(found[6:])]
    assert left == pytest.approx([left[0] * (i + 1) for i in range(len(left))])  # to zero
    if "begins" in says:  # each dialogue once
        assert len(seen) == len(set(seen)) == 20
    last = [record for record in records(run) if record["kind"] == "validation"][-1]
    assert (last["step"], last["epoch"]) == (sum(steps), len(steps))
    capfd.readouterr()
    before = records(run)
    assert train_main(["--resume", str(run)]) == 0  # and it is finished
    assert records(run) == before
    assert "begins again" not in capfd.readouterr().err


def test_with_more_steps_the_rest_of_the_epoch_is_trained(
    folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """--max-steps ended the run, with a validation, within the second epoch."""
    seen, step = [], Trainer.step

    def note(trainer: Trainer, group: Any) -> dict[str, float]:
        seen.extend(row.id for batch in group for row in batch)
        return step(trainer, group)

    monkeypatch.setattr(Trainer, "step", note)
    run = tmp_path / "run"
    assert train_main(flags(folder, "--output", run, "--no-evaluate", "--max-steps", 6)) == 0
    assert train_main(["--resume", str(run), "--max-steps", "0", "--accept-changes"]) == 0
    assert [seen.count(name) for name in set(seen)] == [2] * 20
    found = [r for r in records(run) if r["kind"] == "validation"]
    assert [(record["step"], record["epoch"]) for record in found] == [(4, 1), (6, 2), (8, 2)]


def test_shorter_data_in_mid_epoch_begin_the_epoch_again(
    folder: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    data, run = save_data(tmp_path / "data"), tmp_path / "run"
    at_step(monkeypatch, 6, interrupt)
    argv = flags(folder, "--output", run, "--no-evaluate", "--data", data)
    assert train_main(argv) == 130
    save_data(data, train=9)
    assert train_main(["--resume", str(run)]) == 2
    assert train_main(["--resume", str(run), "--accept-changes"]) == 0
    assert "note: epoch 2 begins again, because its batches changed" in capfd.readouterr().err
    found = [record for record in records(run) if record["kind"] == "step"]
    assert [record["epoch"] for record in found] == [1] * 4 + [2] * (2 + 2)
    assert all(record["learning_rate"] > 0 for record in found)


def test_a_full_fine_tune_goes_on_too(
    folder: Path, full: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    run = tmp_path / "run"
    at_step(monkeypatch, 6, interrupt)
    argv = flags(folder, "--output", run, "--method", "full", "--learning-rate", 0.01)
    assert train_main(argv) == 130
    assert train_main(["--resume", str(run)]) == 0
    assert records(run) == records(full)
    weights = Path("model") / "model.safetensors"
    assert (run / weights).read_bytes() == (full / weights).read_bytes()


def test_a_second_request_stops_at_once_and_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_requests() as stop:
        interrupt(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with stop_requests() as stop:
        interrupt()
        with pytest.raises(KeyboardInterrupt), stop.at_once():
            pytest.fail("a request made before raises too")


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """nohup, and a script's `train.py &`: Ctrl-C in the terminal is not meant for it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            interrupt(signal.SIGINT)
            assert not stop.requested
            interrupt(signal.SIGTERM)
            assert stop.requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_stopped_after_the_last_validation_it_is_not_scored(
    folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    run, original = tmp_path / "run", Trainer.checkpoint

    def checkpoint(trainer: Trainer) -> None:
        original(trainer)
        if trainer.progress.epoch == 2:
            interrupt(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "checkpoint", checkpoint)
    assert train_main(flags(folder, "--output", run)) == 130
    out = capsys.readouterr().out
    assert f"trained, not scored; score it with: python train.py --resume {run} --evaluate\n" in out
    assert records(run)[-1]["kind"] == "end"
    assert not (run / "evaluation.json").exists()
    monkeypatch.undo()
    assert train_main(["--resume", str(run)]) == 0
    assert (run / "evaluation.json").exists()


def test_the_peak_of_memory_is_that_of_all_parts_of_a_run(
    folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    run = tmp_path / "run"
    for megabytes, argv in ((900, flags(folder, "--output", run)), (500, ["--resume", str(run)])):
        monkeypatch.setattr(trainer, "peak_bytes", lambda device, m=megabytes: m * 2**20)
        assert train_main([*argv, "--no-evaluate"]) == 0
        (end,) = (r for r in map(json.loads, (run / "log.jsonl").open()) if r["kind"] == "end")
        assert end["peak_bytes"] == 900 * 2**20
        assert re.search(r"peak memory +900 MiB", capsys.readouterr().out)


def test_a_log_that_lost_its_end_goes_on_after_its_last_whole_line(
    tmp_path: Path, capfd: Any
) -> None:
    path = tmp_path / "log.jsonl"
    with open_log(path, 0) as log:
        log.write("a", x=1)
        log.write("b", x=2)
        kept = log.flush()
    path.write_bytes(path.read_bytes()[:-5])
    with open_log(path, kept) as log:
        log.write("c", x=3)
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["a", "c"]
    assert f"lost {kept // 2} bytes" in capfd.readouterr().err


def test_a_log_is_cut_back_and_goes_on(tmp_path: Path) -> None:
    with open_log(tmp_path / "log.jsonl", 0) as log:
        log.write("a", x=1)
        kept = log.flush()
        log.write("b", x=math.nan)
    with open_log(tmp_path / "log.jsonl", kept) as log:
        log.write("c", x=-math.inf)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"kind": "a", "x": 1},
        {"kind": "c", "x": None},
    ]
