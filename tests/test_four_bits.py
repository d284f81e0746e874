"""QLoRA from the command line, and a base that is quantized as it is read."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import minilora
from minilora import LoRAConfig, NF4Linear
from minilora.__main__ import main
from minilora.summarization import cli
from minilora.summarization.errors import UserError
from minilora.summarization.flags import parse_run
from minilora.summarization.model import loading
from minilora.summarization.model.four_bits import FourBits
from minilora.summarization.presets import LEARNING_RATES, PRESETS
from minilora.summarization.training.trainer import Trainer
from tests.helpers import SMALL, records, save_bart, save_data
from tests.marks import slow_but

CPU = torch.device("cpu")


def equal_states(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_model_read_into_four_bits_is_the_one_quantized_afterwards() -> None:
    read = loading.load_model("pocket-bart", CPU, FourBits())
    whole = loading.load_model("pocket-bart", CPU)
    report = minilora.quantize(whole)
    assert len(report.modules) == 60
    assert equal_states(read, whole)
    assert not read.training
    assert not getattr(read, "is_quantized", False)
    assert not hasattr(read.config, "quantization_config")
    assert read.lm_head.weight is read.model.shared.weight


@pytest.mark.parametrize(
    "targets", slow_but(["attention"], ["attention", ("q_proj", "v_proj"), "all-linear"])
)
def test_what_loftq_quantizes_later_is_read_whole(targets: str | tuple[str, ...]) -> None:
    config = LoRAConfig(rank=4, targets=targets, init="loftq")
    read = loading.load_model("pocket-bart", CPU, FourBits(config))
    attention = read.model.encoder.layers[0].self_attn
    assert isinstance(attention.q_proj, nn.Linear)
    assert isinstance(attention.k_proj, nn.Linear if targets == "all-linear" else NF4Linear)
    minilora.inject(read, config)
    plain = loading.load_model("pocket-bart", CPU, FourBits())
    base = {k.replace(".base.", "."): v for k, v in read.state_dict().items() if "lora_" not in k}
    state = plain.state_dict()
    assert base.keys() == state.keys()
    assert all(torch.equal(base[key], state[key]) for key in base)


def edit(directory: Path, change: dict[str, torch.Tensor | None]) -> None:
    path = directory / "model.safetensors"
    tensors = safetensors.torch.load_file(path) | change
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    safetensors.torch.save_file(kept, path, metadata={"format": "pt"})


FC1 = "model.encoder.layers.0.fc1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({FC1: torch.full((24, 16), math.nan)}, r"layers\.0\.fc1.*not finite"),
        ({FC1: torch.ones(16, 16)}, r"layers\.0\.fc1\.weight is \(16, 16\)"),
        ({FC1: None}, r"lack 1 tensor .*fc1"),
    ],
)
def test_a_damaged_weight_is_named(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    save_bart(tmp_path)
    shape = safetensors.torch.load_file(tmp_path / "model.safetensors")[FC1].shape
    tensor = change[FC1]
    if tensor is not None and tensor.isnan().any():
        change = {FC1: torch.full(shape, math.nan)}
    edit(tmp_path, change)
    with pytest.raises(UserError, match=message):
        loading.load_model(str(tmp_path), CPU, FourBits())


def train(directory: Path, *flags: str) -> int:
    data = (
        save_data(directory / "data") if not (directory / "data").exists() else directory / "data"
    )
    base = directory / "base"
    if not base.exists():
        save_bart(base)
    arguments = ["--model", str(base), "--data", str(data), "--method", "qlora", "--rank", "2"]
    return cli.train_main([*arguments, *SMALL, *flags])


@pytest.mark.slow
@pytest.mark.parametrize("init", ["kaiming", "loftq"])
def test_qlora_trains_saves_resumes_and_is_evaluated(
    tmp_path: Path,
    init: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(tmp_path, "--init", init, "--output", str(whole)) == 0
    out = capsys.readouterr().out
    assert "qlora: " in out
    assert "linears in 4 bits" in out
    config = json.loads((whole / "config.json").read_text())
    assert (config["method"], config["init"]) == ("qlora", init)
    entries = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert entries["init_lora_weights"] == ("loftq" if init == "loftq" else True)

    # A run that was interrupted ends as the other did, on the same base quantized again.
    step = Trainer.step

    def interrupted(trainer: Trainer, group: Any) -> Any:
        if trainer.progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, group)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert train(tmp_path, "--init", init, "--output", str(stopped)) == 130
    assert cli.train_main(["--resume", str(stopped)]) == 0
    assert records(stopped) == records(whole)
    weights = [run / "adapter" / "adapter_model.safetensors" for run in (stopped, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    capsys.readouterr()

    # Scored by itself, the base quantized again, the run gets the scores that it ended with.
    scores = tmp_path / "scores.json"
    assert cli.evaluate_main([str(whole), "--output", str(scores)]) == 0
    again, ended = (json.loads(p.read_text()) for p in (scores, whole / "evaluation.json"))
    assert again["finetuned"] == ended["finetuned"]
    assert again["base"] == ended["base"]
    assert [r["kind"] for r in records(whole)][-1] == "end"


@pytest.mark.parametrize("preset", PRESETS)
def test_qlora_trains_at_loras_rate_in_every_preset(preset: str) -> None:
    """The adapter is the same; only its base is rounded."""
    rates = [
        parse_run(["--preset", preset, "--method", method]).training.learning_rate
        for method in ("qlora", "lora")
    ]
    assert rates[0] == rates[1]
    assert rates[0] is not None


QLORA, LOFTQ = (LEARNING_RATES["pocket"][name] for name in ("qlora", "loftq"))


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        (["--method", "qlora"], QLORA),
        (["--method", "qlora", "--init", "loftq"], LOFTQ),  # its A is shorter
        (["--method", "qlora", "--init", "loftq", "--preset", "bart-base-samsum"], 5e-4),
        (["--method", "qlora", "--init", "loftq", "--learning-rate", "1e-3"], 1e-3),
    ],
)
def test_loftq_has_a_rate_of_its_own_where_it_was_measured(flags: list[str], rate: float) -> None:
    assert parse_run(flags).training.learning_rate == rate


def test_loftq_goes_with_qlora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train_main(["--init", "loftq", "--output", str(tmp_path / "run")]) == 2
    assert "--init loftq requires --method qlora" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_merged_checkpoint_of_qlora_is_that_of_the_four_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "merged"
    assert train(tmp_path, "--init", "loftq", "--no-evaluate", "--output", str(run)) == 0
    assert main(["merge", str(run / "adapter"), str(out), "--dtype", "fp32"]) == 0
    assert "linears dequantized" in capsys.readouterr().out
    # An adapter alone says by its LoftQ start that its base is one in four bits.
    alone, data = tmp_path / "alone", ["--data", str(tmp_path / "data"), "--limit", "1"]
    (run / "adapter").rename(alone)
    assert cli.evaluate_main([str(alone), *data, "--evaluation-batch-size", "1"]) == 0
    alone.rename(run / "adapter")
    trained = loading.load_model(str(tmp_path / "base"), CPU, FourBits())
    minilora.load_adapter(trained, run / "adapter")
    merged = loading.load_model(str(out), CPU)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        logits = [m(input_ids=ids, decoder_input_ids=ids).logits for m in (trained, merged)]
    assert torch.allclose(*logits, rtol=0, atol=1e-4 * logits[0].abs().max().item())
