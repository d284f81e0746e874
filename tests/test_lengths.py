"""Lengths of summaries by the training references, and what a preset's values are good for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LEDConfig, LEDForConditionalGeneration

import minilora
from minilora import LoRAConfig
from minilora.summarization.cli import evaluate_main, train_main
from minilora.summarization.data.lengths import fit_lengths
from minilora.summarization.model import requirements
from minilora.summarization.settings import FILES, GenerationOptions, RunConfig
from minilora.summarization.training.session import _fit, prepare
from tests.helpers import save_bart, save_data, small_bart

# min, max, penalty of a preset; lengths of the references; typed; min, max, penalty that fit
FITS: dict[str, tuple[Any, ...]] = {
    "they fit": ((25, 60, 2.0), range(20, 61), (), (25, 60, 2.0)),
    "news on chats": ((56, 142, 2.0), range(10, 41), (), (16, 142, 1.0)),
    "one length": ((5, 60, 1.0), [9] * 50, (), (8, 60, 1.0)),
    "titles": ((8, 100, 1.0), [3, 3, 4, 5], (), (2, 100, 1.0)),
    "too short a minimum": ((5, 60, 1.0), range(40, 60), (), (43, 60, 1.0)),
    "too short a maximum": ((5, 60, 1.0), range(8, 109), (), (32, 107, 1.0)),
    "one reference": ((5, 60, 1.0), [120], (), (119, 120, 1.0)),
    "a flag's minimum": ((0, 60, 1.0), range(40, 60), ("min_length",), (0, 60, 1.0)),
    "a flag's maximum": ((5, 12, 1.0), range(40, 60), ("max_length",), (12, 12, 1.0)),
    "a flag's penalty": ((56, 142, 2.0), range(10, 41), ("length_penalty",), (16, 142, 2.0)),
}


@pytest.mark.parametrize("name", FITS)
def test_lengths_fit_the_references(name: str) -> None:
    (shortest, longest, penalty), lengths, typed, wanted = FITS[name]
    before = GenerationOptions(min_length=shortest, max_length=longest, length_penalty=penalty)
    found, notices = fit_lengths(before, list(lengths), typed)
    assert (found.min_length, found.max_length, found.length_penalty) == wanted
    assert len(notices) == (found != before)
    for name in ("min_length", "max_length", "length_penalty"):
        said = f"--{name.replace('_', '-')} is {getattr(found, name)} instead of"
        assert (getattr(found, name) != getattr(before, name)) == any(said in n for n in notices)
    assert fit_lengths(found, list(lengths), typed) == (found, [])  # a resumed run says no more


@pytest.fixture
def run(tmp_path: Path) -> list[str]:
    save_bart(tmp_path / "bart")
    save_data(tmp_path / "data", train=12)
    argv = ["--model", tmp_path / "bart", "--data", tmp_path / "data", "--output", tmp_path / "run"]
    argv += ["--device", "cpu", "--precision", "fp32", "--max-steps", 2, "--no-report"]
    return list(map(str, argv))


def test_a_run_says_once_which_lengths_and_rate_it_takes(
    run: list[str], tmp_path: Path, capsys: Any
) -> None:
    assert train_main([*run, "--preset", "notebook", "--batch-size", "4"]) == 0
    err = capsys.readouterr().err
    assert err.count("note: the training summaries have ") == 1
    assert err.count("--learning-rate 1e-05 is that of the preset notebook") == 1
    settings = json.loads((tmp_path / "run/config.json").read_text())
    assert settings["min_length"] < 56
    assert settings["length_penalty"] == 1.0
    assert f"--min-length is {settings['min_length']} instead of 56" in err
    generation = json.loads((tmp_path / "run/evaluation.json").read_text())["generation"]
    assert generation["min_length"] == settings["min_length"]


def test_flags_and_a_resumed_run_keep_their_lengths(
    run: list[str], tmp_path: Path, capsys: Any
) -> None:
    flags = ["--min-length", "0", "--max_length=7", "--length-penalty", "1", "--no-evaluate"]
    assert train_main([*run, *flags, "--learning-rate", "0.01"]) == 0
    before = (tmp_path / "run/config.json").read_text()
    assert json.loads(before)["max_length"] == 7
    assert train_main(["--resume", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/config.json").read_text() == before
    err = capsys.readouterr().err
    assert "training summaries" not in err
    assert "--learning-rate" not in err


def test_the_preset_on_its_own_data_is_not_touched() -> None:
    assert RunConfig().of_preset("model", "data")
    other = RunConfig()
    other.data.data = "minichat"
    assert not other.of_preset("model", "data")
    files = RunConfig()
    files.data.train_file = "mine.csv"
    assert not files.of_preset("model", "data", *FILES)


# What is not adapted ------------------------------------------------------------------------------


def test_a_side_without_adapters_is_named() -> None:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "vocab_size": 60}
    model = LEDForConditionalGeneration(LEDConfig(**sizes, attention_window=[8]))
    minilora.inject(model, LoRAConfig(rank=2, targets=("q_proj", "v_proj")))
    (notice,) = requirements.not_adapted(model)
    assert notice.startswith("nothing in the encoder is adapted")
    assert "query, key, value" in notice
    model = LEDForConditionalGeneration(LEDConfig(**sizes, attention_window=[8]))
    minilora.inject(model, LoRAConfig(rank=2))  # "attention" knows the names of both sides
    assert requirements.not_adapted(model) == []
    model = small_bart()
    minilora.inject(model, LoRAConfig(rank=2, targets=("q_proj",)))
    assert requirements.not_adapted(model) == []


def test_whole_modules_train_in_float32_beside_a_base_in_half_precision() -> None:
    """A step that bf16 would round away moves every entry."""
    model = small_bart(tie_word_embeddings=False)
    config = LoRAConfig(rank=2, targets=("q_proj",), also_train=("lm_head",), bias="all")
    minilora.inject(model, config)
    prepare(model, RunConfig(), torch.bfloat16)
    frozen = [m for m in model.modules() if type(m) is nn.Linear and not m.weight.requires_grad]
    assert {m.weight.dtype for m in frozen} == {torch.bfloat16}
    trained = list(minilora.trainable_parameters(model))
    assert {p.dtype for p in trained} == {torch.float32}
    before = [p.detach().clone() for p in trained]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(trained, lr=1e-5).step()
    assert all((now != then).all() for now, then in zip(trained, before, strict=True))


def test_a_learning_rate_of_a_preset_is_said_to_be_that_of_its_own_model() -> None:
    run = RunConfig()
    run.training.learning_rate = 0.004
    said = "--learning-rate 0.004 is that of the preset pocket, chosen for its own model and"
    assert [said in notice for notice in _fit(run, [20] * 50)][-1]
    run.typed = frozenset({"learning_rate"})
    assert not any(said in notice for notice in _fit(run, [20] * 50))


@pytest.mark.parametrize("data", ["bookings", "minichat", "minichat-hard"])
def test_no_minimum_is_forced_on_summaries_of_the_embedded_data(data: str) -> None:
    run = RunConfig()
    run.data.data = data
    _fit(run, [30] * 50)
    assert run.generation == RunConfig().generation
    run.data.train_file = "mine.jsonl"
    _fit(run, [30] * 50)
    assert run.generation.min_length == 29


# Numbers that are none ----------------------------------------------------------------------------


def test_logits_that_are_not_finite_end_in_one_line(
    run: list[str], tmp_path: Path, capsys: Any
) -> None:
    """In the base or the fine-tuned model, greedy and by beams, before and after training."""
    assert train_main([*run, "--no-evaluate", "--method", "full"]) == 0
    for folder in ("bart", "run/model"):
        path = tmp_path / folder / "model.safetensors"
        whole = path.read_bytes()
        tensors = load_file(path)
        tensors["model.decoder.layers.0.fc2.bias"][0] = float("inf")
        save_file(tensors, path, {"format": "pt"})
        capsys.readouterr()
        for beams in (1, 3):
            settings = json.loads((tmp_path / "run/config.json").read_text())
            (tmp_path / "run/config.json").write_text(json.dumps(settings | {"beams": beams}))
            assert evaluate_main([str(tmp_path / "run"), "--device", "cpu"]) == 2
            out, err = capsys.readouterr()
            assert err.count("\n") == 1
            assert "the logits are not finite while summarizing" in err
            assert "rouge1" not in out
        if folder == "bart":
            run[run.index("--output") + 1] = str(tmp_path / "new")
            assert train_main(run) == 2
            assert "the logits are not finite" in capsys.readouterr().err
            assert not (tmp_path / "new").exists()
        path.write_bytes(whole)


def test_a_validation_loss_that_is_not_finite_ends_in_one_line(
    run: list[str], capsys: Any, monkeypatch: Any
) -> None:
    from minilora.summarization.training import validation

    def summed(*_: object) -> tuple[torch.Tensor, int]:
        return torch.tensor(float("nan")), 5

    monkeypatch.setattr(validation, "summed_loss", summed)
    assert train_main([*run, "--no-evaluate"]) == 2
    assert "the validation loss is nan on the dialogues " in capsys.readouterr().err
