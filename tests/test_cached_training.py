"""Runs whose encoder is computed once: the same losses, texts and bits as without."""

import functools
import itertools
import json
import math
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM
from transformers.models.bart.modeling_bart import BartEncoder

import minilora
from minilora.summarization.cli import evaluate_main, train_main
from minilora.summarization.flags import parse_run
from minilora.summarization.model import encoder_cache, state_files
from minilora.summarization.training.session import DECODER, open_session
from minilora.summarization.training.trainer import fit
from tests.conftest import tiny_bart, tiny_t5
from tests.helpers import SMALL, records, save_bart, save_data
from tests.test_training import at_step, check_same, interrupt

NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    save_bart(folder / "bart")
    save_bart(folder / "calm", **NO_DROPOUT)
    save_bart(folder / "deep", encoder_layers=2, decoder_layers=2, dropout=0.3)
    save_bart(folder / "deep calm", encoder_layers=2, decoder_layers=2, **NO_DROPOUT)
    save_data(folder / "data")
    save_data(folder / "more", train=60)
    return folder


def flags(folder: Path, *more: object, model: str = "bart", data: str = "data") -> list[str]:
    base = ["--model", folder / model, "--data", folder / data, *SMALL, "--rank", 3]
    base += ["--targets", "decoder", "--cache-directory", folder / "states"]
    return [str(flag) for flag in [*base, *more]]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    assert train_main(flags(folder, "--output", folder / "whole")) == 0
    return folder / "whole"


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run) if record["kind"] == "step"]


# Training -----------------------------------------------------------------------------------------


UPPER = ("--targets", "q_proj", "v_proj", "--layers", "1")


@pytest.mark.parametrize(("model", "targets"), [("calm", ()), ("deep calm", UPPER)])
def test_losses_of_50_steps_are_those_without_it(
    folder: Path, tmp_path: Path, model: str, targets: tuple[str, ...]
) -> None:
    """float32 sums over other padding: within 1e-5, while the loss falls by more than 0.5.

    Of the second case's encoder only the second layer is adapted, and the first is computed once.
    """
    more = (*targets, "--dropout", "0", "--epochs", 5, "--no-evaluate", "--cache-encoder")
    for choice in ("on", "off"):
        run = flags(folder, *more, choice, "--output", tmp_path / choice, model=model, data="more")
        assert train_main(run) == 0
    with_it, without = losses(tmp_path / "on"), losses(tmp_path / "off")
    assert len(with_it) == len(without) == 50
    assert without[0] - without[-1] > 0.5
    assert max(abs(a - b) for a, b in zip(with_it, without, strict=True)) < 1e-5
    validations = [
        [record["loss"] for record in records(tmp_path / choice) if record["kind"] == "validation"]
        for choice in ("on", "off")
    ]
    assert validations[0] == pytest.approx(validations[1], abs=1e-5)


def test_a_prefix_in_the_decoder_learns_as_without_it(folder: Path, tmp_path: Path) -> None:
    """Beside LoRA; the tolerance is that of the test above."""
    places = ("--with", "prefix", "--prefix-places", "decoder", "cross", "--prefix-hidden", 8)
    more = (*places, "--dropout", "0", "--cache-encoder")
    for choice in ("on", "off"):
        run = flags(folder, *more, choice, "--output", tmp_path / choice, model="calm")
        assert train_main(run) == 0
    with_it, without = losses(tmp_path / "on"), losses(tmp_path / "off")
    assert without[0] - without[-1] > 0.02
    assert max(abs(a - b) for a, b in zip(with_it, without, strict=True)) < 1e-5
    texts = [json.loads((tmp_path / c / "evaluation.json").read_bytes()) for c in ("on", "off")]
    assert texts[0] == texts[1]


def test_training_and_validation_never_call_the_encoder(folder: Path, tmp_path: Path) -> None:
    session = open_session(parse_run(flags(folder, "--no-evaluate")))
    calls: list[int] = []
    session.model.get_encoder().register_forward_pre_hook(lambda *_: calls.append(1))
    fit(session, tmp_path)
    assert len(losses(tmp_path)) == 8
    assert not calls


def test_it_is_said_and_the_states_are_kept_only_where_they_are_read_again(
    folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def kept(*more: object) -> tuple[bool, bool]:
        session = open_session(parse_run(flags(folder, "--no-evaluate", *more)))
        return tuple(session.splits[name].states is not None for name in ("train", "validation"))

    assert kept() == (True, True)
    assert kept("--epochs", 1) == (False, True)
    assert kept("--max-steps", 4) == (False, True)  # 20 dialogues, six a step
    assert kept("--epochs", 1, "--cache-encoder", "on") == (True, True)
    assert kept("--cache-encoder", "off") == (False, False)
    assert kept("--targets", "attention") == (False, False)
    assert kept("--with", "prompt") == (False, False)
    assert kept("--method", "prefix") == (False, False)
    assert kept("--method", "prefix", "--prefix-places", "decoder", "cross") == (True, True)
    assert capsys.readouterr() == ("", "")  # beside the header not a word
    again = ["--resume", str(whole), "--no-evaluate"]
    assert train_main(again) == 0
    said = r"^encoder: computed once for each dialogue \(0\.\d MB in memory\), its dropout is off$"
    assert re.search(said, capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    "more",
    [
        ("--method", "full"),
        ("--targets", "q_proj"),
        ("--method", "prompt"),
        ("--method", "prefix"),
        ("--with", "prompt"),
        ("--with", "prefix", "--prefix-places", "encoder"),
    ],
)
def test_on_is_refused_in_one_line_where_the_encoder_trains(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    run = flags(folder, "--cache-encoder", "on", "--output", tmp_path / "run", *more)
    assert train_main(run) == 2
    (line,) = capsys.readouterr().err.splitlines()
    advice = (
        "trains and is not in the decoder: choose targets, and places of a prefix, in the decoder"
    )
    assert re.fullmatch(rf"train\.py: --cache-encoder on: \S+ {advice}", line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "more", [("--precision", "bf16"), ("--method", "qlora"), ("--checkpoint-activations",)]
)
def test_it_goes_with_other_ways_to_train(
    folder: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    run = flags(folder, "--cache-encoder", "on", "--output", tmp_path, *more, "--max-steps", 6)
    assert train_main(run) == 0
    found = losses(tmp_path)
    assert len(found) == 6
    assert all(map(math.isfinite, found))
    assert json.loads((tmp_path / "evaluation.json").read_bytes())["n"] == 4


# Going on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "file", "a file that was removed"])
def test_a_resumed_run_ends_bit_for_bit_the_same(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    place = tmp_path / "states"
    if where != "memory":
        monkeypatch.setattr(encoder_cache, "IN_MEMORY", 0)
    at_step(monkeypatch, 6, lambda: interrupt(signal.SIGINT))
    run = tmp_path / "run"
    assert train_main(flags(folder, "--output", run, "--cache-directory", place)) == 130
    if where == "memory":
        assert not place.exists()
    else:
        assert len(list(place.glob("*.safetensors"))) == 2  # train and validation
    if where == "a file that was removed":
        shutil.rmtree(place)
    assert train_main(["--resume", str(run)]) == 0
    check_same(run, whole)


def test_with_the_first_layer_computed_once_a_run_resumes_and_is_scored_as_without(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = flags(folder, *UPPER, model="deep")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train_main([*argv, "--output", str(whole)]) == 0
    assert "encoder, layers below 1: computed once for each dialogue" in capsys.readouterr().out
    at_step(monkeypatch, 6, lambda: interrupt(signal.SIGINT))
    assert train_main([*argv, "--output", str(run)]) == 130
    assert train_main(["--resume", str(run)]) == 0
    check_same(run, whole)
    found = []
    for choice in ("on", "off"):
        output = tmp_path / choice
        assert evaluate_main([str(whole), "--output", str(output), "--cache-encoder", choice]) == 0
        found.append(json.loads(output.read_bytes())["examples"])
    assert found[0] == found[1]
    assert any(row["base"] != row["finetuned"] for row in found[0])


def test_a_resumed_run_does_not_begin_to_drop_out_in_the_encoder(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(encoder_cache, "IN_MEMORY", 0)
    at_step(monkeypatch, 6, lambda: interrupt(signal.SIGINT))
    run, place = tmp_path / "run", tmp_path / "states"
    assert train_main(flags(folder, "--output", run, "--cache-directory", place)) == 130
    capsys.readouterr()
    monkeypatch.setattr(state_files, "ON_DISK", 1)  # no room any more
    assert train_main(["--resume", str(run), "--cache-directory", str(tmp_path / "other")]) == 2
    said = "changed since the run began: use of the encoder's states (--cache-encoder on --accept-c"
    assert said in capsys.readouterr().err


def test_a_run_that_found_no_room_for_states_goes_on_without_them(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(encoder_cache, "IN_MEMORY", 0)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(state_files, "ON_DISK", 1)
        at_step(patch, 6, lambda: interrupt(signal.SIGINT))
        assert (
            train_main(flags(folder, "--output", run, "--cache-directory", tmp_path / "a")) == 130
        )
    capsys.readouterr()
    resume = ["--resume", str(run)]
    assert train_main(resume) == 2
    found = re.search(r"\((--cache-encoder off --accept-changes) ", capsys.readouterr().err)
    assert found is not None
    assert train_main([*resume, *found[1].split()]) == 0
    assert "changed since" not in capsys.readouterr().err


# Evaluating ---------------------------------------------------------------------------------------


def test_evaluation_writes_the_same_texts_from_one_set_of_states(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    original = BartEncoder.forward

    @functools.wraps(original)  # generate looks at the signature
    def forward(self: BartEncoder, input_ids: torch.Tensor, *args: Any, **more: Any) -> Any:
        calls.append(len(input_ids))
        return original(self, input_ids, *args, **more)

    monkeypatch.setattr(BartEncoder, "forward", forward)
    found, rows = [], []
    for choice in ("auto", "off"):
        calls.clear()
        output = str(tmp_path / choice)
        more = ["--output", output, "--beams", "3", "--cache-encoder", choice]
        assert evaluate_main([str(whole), *more]) == 0
        evaluation = json.loads(Path(output).read_bytes())
        del evaluation["generation"]
        found.append(evaluation)
        rows.append(sum(calls))
    assert found[0] == found[1]
    texts = {row[side] for row in found[0]["examples"] for side in ("base", "finetuned")}
    assert len(texts) > 4  # of four dialogues: both models, and not one answer to all
    assert rows == [1 + 2 + 4, 1 + 4 + 4]  # a trial; the probe and all once, or all twice


def test_evaluate_reads_the_file_that_the_run_has_written(
    folder: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encoder_cache, "IN_MEMORY", 0)
    run, place = tmp_path / "run", tmp_path / "states"
    assert train_main(flags(folder, "--output", run, "--cache-directory", place)) == 0
    before = {path: path.read_bytes() for path in place.glob("*.safetensors")}
    assert len(before) == 3  # train, validation and test
    capsys.readouterr()
    assert evaluate_main([str(run)]) == 0
    assert "writing" not in capsys.readouterr().err
    assert {path: path.read_bytes() for path in place.glob("*.safetensors")} == before


# The short form -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (tiny_bart, "model.decoder.layers.0.{self_attn,encoder_attn}.{q,v}_proj"),
        (tiny_t5, "decoder.block.{0,1}.layer.{0.SelfAttention,1.EncDecAttention}.{q,v}"),
    ],
)
def test_decoder_is_query_and_value_of_both_attentions_of_the_decoder(
    build: Any, names: str
) -> None:
    model = build()
    report = minilora.inject(model, minilora.LoRAConfig(rank=2, targets=DECODER))
    parts = [part.split(",") for part in re.findall(r"\{(.*?)\}", names)]
    form = re.sub(r"\{.*?\}", "{}", names)
    assert {*report.modules} == {form.format(*chosen) for chosen in itertools.product(*parts)}


def test_peft_reads_the_adapter(folder: Path, whole: Path) -> None:
    settings = json.loads((whole / "adapter" / "adapter_config.json").read_bytes())
    assert settings["target_modules"] == DECODER
    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder / "bart")
    ids, start = torch.tensor([[0, 50, 60, 2]]), torch.tensor([[2, 0, 70]])
    with torch.no_grad():
        base = theirs(input_ids=ids, decoder_input_ids=start).logits
        theirs = PeftModel.from_pretrained(theirs, whole / "adapter").eval()
        wanted = theirs(input_ids=ids, decoder_input_ids=start).logits
        ours = AutoModelForSeq2SeqLM.from_pretrained(folder / "bart").eval()
        minilora.load_adapter(ours, whole / "adapter", inference=True)
        logits = ours(input_ids=ids, decoder_input_ids=start).logits
    assert torch.equal(logits, wanted)
    assert (logits - base).abs().max() > 1e-3
