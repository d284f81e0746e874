"""Runs that start from an adapter, more of LoRAConfig as flags, and merged models that are scored.

The reference is PEFT.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import BartForConditionalGeneration

import minilora
from minilora.__main__ import main
from minilora.summarization import commands
from minilora.summarization.cli import evaluate_main, train_main
from minilora.summarization.flags import parse_run
from minilora.summarization.model import loading
from minilora.summarization.report.terminal import printable
from minilora.summarization.training.session import Session, open_session
from tests.helpers import SMALL, save_bart, save_data
from tests.marks import slow_but

SHORT = ["--max-steps", "3", "--no-evaluate", "--no-report"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bart, data, a run of rank 3, and an adapter of PEFT's with a random B: read only."""
    folder = tmp_path_factory.mktemp("start")
    save_bart(folder / "bart", encoder_layers=2)
    save_data(folder / "data")
    run = ["--model", str(folder / "bart"), "--data", str(folder / "data"), *SMALL, *SHORT]
    assert train_main([*run, "--rank", "3", "--output", str(folder / "run")]) == 0
    base = BartForConditionalGeneration.from_pretrained(folder / "bart")
    config = peft.LoraConfig(
        r=2, lora_alpha=7, lora_dropout=0.2, target_modules=["q_proj", "fc1"],
        rank_pattern={"fc1": 5}, init_lora_weights=False, task_type="SEQ_2_SEQ_LM",
    )  # fmt: skip
    torch.manual_seed(1)
    peft.get_peft_model(base, config).save_pretrained(folder / "peft")
    return folder


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path in folder.iterdir():
        shutil.copytree(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


BASE = ["--model", "bart", "--data", "data", *SMALL]
FREE = [word for word in BASE if word not in ("--targets", "q_proj", "v_proj")]  # an adapter says


def session(*flags: str) -> Session:
    return open_session(parse_run([*FREE, *flags]))


def logits(model: Any) -> Tensor:
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids, decoder_input_ids=ids.flip(1)).logits
    return found


def by_peft(directory: str) -> Tensor:
    base = BartForConditionalGeneration.from_pretrained("bart")
    return logits(peft.PeftModel.from_pretrained(base, directory))


def settings(run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(run, "config.json").read_text())
    return found


# Flags of LoRAConfig ------------------------------------------------------------------------------

FLAGS: dict[str, tuple[list[str], dict[str, Any], int]] = {
    # flags; what config.json says; how many modules are adapted
    "dora": (["--dora"], {"dora": True}, 8),
    "layers": (["--layers", "1"], {"layers": [1]}, 2),
    "ranks": (
        ["--rank-pattern", "encoder.*q_proj=2", "v_proj=5"],
        {"rank_pattern": ["encoder.*q_proj=2", "v_proj=5"]},
        8,
    ),
    "whole modules": (
        ["--also-train", "final_layer_norm", "encoder.layers.0.fc1"],
        {"also_train": ["final_layer_norm", "encoder.layers.0.fc1"]},
        8,
    ),
    "all": (
        ["--dora", "--layers", "0", "--rank-pattern", "q_proj=2", "--also-train", "fc2"],
        {"dora": True, "layers": [0], "rank_pattern": ["q_proj=2"], "also_train": ["fc2"]},
        6,
    ),
}


@pytest.mark.parametrize("name", slow_but(["all"], FLAGS))
def test_flags_train_are_kept_resumed_and_read_by_peft(here: Path, name: str) -> None:
    flags, kept, count = FLAGS[name]
    argv = [*BASE, "--rank", "4", *SHORT, "--checkpoint-steps", "1", "--keep-checkpoints", "9"]
    assert train_main([*argv, *flags, "--output", "out"]) == 0
    assert settings("out").items() >= kept.items()
    adapter = minilora.read_adapter("out/adapter")
    assert len(adapter.modules) == count
    # PEFT computes what minilora computes, and it is another thing than the base.
    base = loading.load_model("bart", torch.device("cpu"))
    before = logits(base)
    minilora.load_adapter(base, "out/adapter", inference=True)
    assert torch.allclose(logits(base), by_peft("out/adapter"), atol=1e-5)  # DoRA sums elsewhere
    assert (logits(base) - before).abs().max() > 1e-2
    # Stopped after the first step and resumed, the run ends alike.
    shutil.copytree("out", "again")
    first, *later = sorted(Path("again/checkpoints").iterdir())
    assert first.name == "step-00000001"
    for path in [*later, Path("again/adapter")]:
        shutil.rmtree(path)
    assert train_main(["--resume", "again"]) == 0
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert Path("again/adapter", file).read_bytes() == Path("out/adapter", file).read_bytes()


BAD_FLAGS = {
    "a rank without a name": (["--rank-pattern", "4"], "--rank-pattern 4: must be NAME=RANK"),
    "a name without a rank": (["--rank-pattern", "q_proj"], "--rank-pattern q_proj: must be NAME"),
    "no number": (["--rank-pattern", "q_proj=x"], "--rank-pattern q_proj=x: must be NAME=RANK"),
    "rank 0": (["--rank-pattern", "q_proj=0"], "must be a whole number of at least 1, not 0"),
    "twice": (["--rank-pattern", "a=1", "a=2"], "--rank-pattern gives a twice"),
    "no regex": (["--rank-pattern", "(=1"], "rank_pattern: '(' is not a regular expression"),
    "misspelt": (["--rank-pattern", "q_porj=1"], "rank_pattern: 'q_porj': nothing matches it"),
    "too high": (["--rank-pattern", "q_proj=99"], "rank 99 is above the smaller side"),
    "no such layer": (["--layers", "7"], "layers: no target lies in a layer 7"),
    "no number of a layer": (["--layers", "x"], "--layers: invalid int value: 'x'"),
    "layers of an expression": (
        ["--layers", "0", "--targets", ".*q_proj"],
        "layers needs targets as a list of names",
    ),
    "no such module": (["--also-train", "final_layer"], "also_train: 'final_layer': nothing match"),
    "tied": (["--also-train", "shared"], "shared shares its weight with"),
    "in four bits": (["--also-train", "fc1", "--method", "qlora"], "whose weight cannot train"),
}


def refused(capfd: Any, argv: list[str], says: str) -> None:
    capfd.readouterr()
    try:
        code: object = train_main(argv)
    except SystemExit as exit:
        code = exit.code
    out, err = capfd.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert says in err
    assert not Path("new").exists()


@pytest.mark.parametrize(("flags", "says"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags(here: Path, capfd: Any, flags: list[str], says: str) -> None:
    refused(capfd, [*BASE, *flags, "--output", "new"], says)


UNUSED: dict[str, tuple[list[str], str]] = {
    "full": (
        ["--method", "full", "--rank", "4", "--dora"],
        "--method full does not use --dora, --rank",
    ),
    "prompt": (
        ["--method", "prompt", "--alpha", "4", "--prefix-hidden", "3"],
        "--method prompt does not use --alpha, --prefix-hidden",
    ),
    "lora": (["--virtual-tokens", "4"], "--method lora does not use --virtual-tokens"),
}


@pytest.mark.parametrize("name", UNUSED)
def test_a_flag_that_the_method_does_not_read_is_said(here: Path, name: str) -> None:
    flags, says = UNUSED[name]
    free = [word for word in FREE if word not in ("--dropout", "0.1")]
    run = parse_run([*free, *flags])
    assert [note for note in open_session(run).notices if "does not use" in note] == [says]
    used = parse_run([*free, "--method", "lora", "--with", "prefix", "--virtual-tokens", "4"])
    assert not used.unused() & used.typed


# From an adapter ----------------------------------------------------------------------------------


def test_a_run_starts_from_an_adapter_of_peft(here: Path, capfd: Any) -> None:
    start = session("--adapter", "peft")
    assert torch.equal(logits(start.model), by_peft("peft"))
    assert (logits(start.model) - logits(minilora.unload(start.model))).abs().max() > 1e-2
    assert (
        train_main([*FREE, *SHORT, "--adapter", "peft", "--dropout", "0", "--output", "new"]) == 0
    )
    says = "--adapter peft: the run starts from it, with rank 2, alpha 7, targets "
    assert f"note: {says}" in capfd.readouterr().err
    kept = {"adapter": "./../peft", "model": "./../bart", "method": "lora"}
    kept |= {"rank": 2, "alpha": 7, "dropout": 0.0, "init": "kaiming"}
    kept |= {"rank_pattern": [f"{name}=5" for name in ("fc1",)]}
    assert settings("new").items() >= kept.items()
    assert sorted(settings("new")["targets"]) == ["fc1", "q_proj"]
    before, after = minilora.read_adapter("peft"), minilora.read_adapter("new/adapter")
    assert after.config.dropout == 0
    assert before.tensors.keys() == after.tensors.keys()
    for key, tensor in after.tensors.items():  # three steps of AdamW at 0.02 at most
        assert 0 < (tensor - before.tensors[key]).abs().max() < 0.1


def test_a_run_starts_from_a_run_and_is_resumed(here: Path, capfd: Any) -> None:
    """Its base is that of the run, whatever the preset says."""
    argv = ["--data", "data", *SMALL, *SHORT, "--adapter", "run", "--checkpoint-steps", "1"]
    argv += ["--keep-checkpoints", "9"]
    assert train_main([*argv, "--output", "new"]) == 0
    assert settings("new").items() >= {"rank": 3, "adapter": "./../run"}.items()
    assert Path(settings("new")["model"]).name == "bart"
    shutil.copytree("new", "again")
    for path in sorted(Path("again/checkpoints").iterdir())[1:]:
        shutil.rmtree(path)
    capfd.readouterr()
    assert train_main(["--resume", "again"]) == 0
    weights = "adapter/adapter_model.safetensors"
    assert Path("again", weights).read_bytes() == Path("new", weights).read_bytes()
    assert Path("new", weights).read_bytes() != Path("run", weights).read_bytes()
    # A resumed run must not continue from another one.
    adapter = minilora.read_adapter("run")
    next(iter(adapter.tensors.values())).add_(1)
    minilora.write_adapter(adapter, "run/adapter")
    capfd.readouterr()
    assert train_main(["--resume", "again"]) == 2
    assert "changed since the run began: adapter it starts from;" in capfd.readouterr().err


def test_a_run_is_resumed_without_the_adapter_it_started_from(here: Path, capfd: Any) -> None:
    argv = ["--data", "data", *SMALL, *SHORT, "--adapter", "peft", "--checkpoint-steps", "1"]
    argv = [word for word in argv if word not in ("--targets", "q_proj", "v_proj")]
    assert train_main([*argv, "--keep-checkpoints", "9", "--output", "whole"]) == 0
    shutil.copytree("whole", "run2")
    for path in sorted(Path("run2/checkpoints").iterdir())[1:]:
        shutil.rmtree(path)
    Path("peft").rename("elsewhere")
    capfd.readouterr()
    assert train_main(["--resume", "run2"]) == 0
    note = "note: --adapter peft is gone: the run's checkpoint is used instead\n"
    assert note in capfd.readouterr().err
    weights = "adapter/adapter_model.safetensors"
    assert Path("run2", weights).read_bytes() == Path("whole", weights).read_bytes()
    # It is still compared when it is there again, and needed where there is no checkpoint.
    adapter = minilora.read_adapter("elsewhere")
    next(iter(adapter.tensors.values())).add_(1)
    minilora.write_adapter(adapter, "peft")
    assert train_main(["--resume", "run2"]) == 2
    assert "changed since the run began: adapter it starts from;" in capfd.readouterr().err
    shutil.rmtree("peft")
    shutil.rmtree("run2/checkpoints")
    refused(capfd, ["--resume", "run2"], "peft: no such directory")


def test_a_run_starts_from_an_adapter_of_the_hub(here: Path, monkeypatch: Any) -> None:
    def download(name: str, allow_patterns: object) -> str:
        assert name == "ann/adapter"
        return str(here / "peft")

    monkeypatch.setattr(loading, "snapshot_download", download)
    start = session("--adapter", "ann/adapter")
    assert torch.equal(logits(start.model), by_peft("peft"))
    assert start.run.adapter.adapter == "ann/adapter"


@pytest.mark.slow
def test_a_run_starts_from_an_adapter_in_four_bits(here: Path, capfd: Any) -> None:
    """Whatever the adapter says of itself: the base is quantized, A and B are the adapter's."""
    argv = [*FREE, "--targets", "q_proj", "v_proj", *SHORT, "--method", "qlora", "--rank", "3"]
    assert train_main([*argv, "--init", "loftq", "--output", "loftq"]) == 0
    for name, flags in (("loftq", []), ("peft", ["--method", "qlora"])):
        start = session("--adapter", name, *flags)
        assert start.run.model.method == "qlora"
        tensors = minilora.read_adapter(name).tensors
        layer = start.model.get_submodule("model.encoder.layers.0.self_attn.q_proj")
        stem = "base_model.model.model.encoder.layers.0.self_attn.q_proj"
        assert isinstance(layer.base, minilora.NF4Linear)
        assert torch.equal(layer.lora_B, tensors[f"{stem}.lora_B.weight"])
    assert train_main([*FREE, *SHORT, "--adapter", "loftq", "--output", "new"]) == 0
    assert settings("new").items() >= {"method": "qlora", "init": "loftq"}.items()
    shutil.rmtree("new")
    argv = [*FREE, "--adapter", "loftq", "--method", "lora", "--output", "new"]
    refused(capfd, argv, "--adapter loftq was started by LoftQ: it needs --method qlora")


BAD_STARTS = {
    "another rank": (["--adapter", "peft", "--rank", "4"], "--adapter peft has --rank 2, not 4"),
    "more": (
        ["--adapter", "peft", "--alpha", "1", "--dora"],
        "--adapter peft has --alpha 7, not 1.0 and --dora False, not True: leave such flags out",
    ),
    "other targets": (["--adapter", "peft", "--targets", "fc1"], ", not fc1: leave such flags out"),
    "full": (["--adapter", "peft", "--method", "full"], "goes with --method lora or qlora, not"),
    "nothing": (["--adapter", "nothing"], "nothing: no such directory"),
    "data": (["--adapter", "data"], "data/adapter_config.json: no such file; an adapter direct"),
    "another model": (["--adapter", "other"], "the adapter does not fit the model"),
    "with --resume": (["--resume", "run", "--adapter", "peft"], "--adapter (was None, is 'peft')"),
    "with a prompt": (["--adapter", "peft", "--with", "prompt"], "does not go with --with prompt"),
    "a prompt": (["--adapter", "peft", "--method", "prompt"], "goes with --method lora or qlora"),
    "a run as a model": (["--model", "run"], "model run: it is a run, not a model: use --adapter"),
    "nothing to accept": (["--accept-changes"], "--accept-changes is for --resume: leave it out"),
    "an empty name": (["--adapter", ""], "--adapter must not be empty"),
    "an empty run": (["--resume", ""], "--resume must not be empty"),
    "an empty file": (["--train-file", ""], "--train-file must not be empty"),
    "an empty list": (["--targets", ""], "--targets must not be empty"),
}


@pytest.mark.parametrize(("flags", "says"), BAD_STARTS.values(), ids=BAD_STARTS)
def test_bad_starts(here: Path, capfd: Any, flags: list[str], says: str) -> None:
    if "other" in flags:
        wide = save_bart(here / "wide", d_model=32)
        argv = ["--model", str(wide), *BASE[2:], *SHORT, "--output", "other"]
        assert train_main(argv) == 0
    argv = [] if "--resume" in flags else [*FREE, "--output", "new"]
    refused(capfd, [*argv, *flags], says)


def test_an_adapter_without_a_base_needs_the_model(here: Path, capfd: Any) -> None:
    entries = json.loads(Path("peft/adapter_config.json").read_text())
    text = json.dumps(entries | {"base_model_name_or_path": None})
    Path("peft/adapter_config.json").write_text(text)
    argv = [*FREE[2:], "--adapter", "peft", "--output", "new"]
    refused(capfd, argv, "--adapter peft does not name its base model: pass --model")
    run = session("--adapter", "peft", "--targets", "q_proj", "fc1", "--rank", "2").run
    assert sorted(run.adapter.targets) == ["fc1", "q_proj"]  # flags may repeat what it says


# Merged models ------------------------------------------------------------------------------------


def test_a_merged_model_is_scored(here: Path, capfd: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(commands, "choose_precision", lambda *_: None)  # the run says fp32
    assert main(["merge", "run", "merged"]) == 0
    lengths = ["--max-length", "12", "--min-length", "9", "--beams", "1", "--device", "cpu"]
    data = ["--data", "data/test.jsonl"]
    assert evaluate_main(["run", *lengths, *data, "--output", "a.json"]) == 0
    assert evaluate_main(["merged", "--model", "bart", *lengths, *data, "--output", "b.json"]) == 0
    before, after = (json.loads(Path(name).read_text()) for name in ("a.json", "b.json"))
    assert before["examples"] == after["examples"]
    assert any(row["base"] != row["finetuned"] for row in after["examples"])
    capfd.readouterr()
    # Its own chats need no base, unless that is asked for.
    row = next(row for row in after["examples"] if row["finetuned"])
    Path("chat.txt").write_text(row["dialogue"])
    assert evaluate_main(["merged", *lengths, "--text", "chat.txt"]) == 0
    said = capfd.readouterr()
    assert said.out == f"{printable(row['finetuned']).strip()}\n"
    assert said.err == (
        "note: merged is not a run: unless flags say otherwise, no text is put before or after a "
        "dialogue, and the lengths are the preset pocket's: --max-source-length 512 "
        "--min-length 9 --max-length 12\n"
    )
    for flags in ([], ["--text", "chat.txt", "--base"]):
        assert evaluate_main(["merged", *flags]) == 2
        says = "evaluate.py: merged is a model: name its base with --model BASE\n"
        assert capfd.readouterr() == ("", says)


def test_a_full_fine_tune_summarizes_without_its_base(here: Path, capfd: Any) -> None:
    """Its tokenizer is beside it. Scores are also of the base, so they need it."""
    argv = [*BASE, *SHORT, "--method", "full", "--output", "full"]
    assert train_main(argv) == 0
    Path("chat.txt").write_text("Ann: hi\nBob: hello")
    text = ["--text", "chat.txt", "--device", "cpu", "--min-length", "9", "--max-length", "12"]
    capfd.readouterr()
    assert evaluate_main(["full", *text]) == 0
    expected = capfd.readouterr().out
    Path("bart").rename("elsewhere")
    for model in ("full", "full/model"):
        assert evaluate_main([model, *text]) == 0
        assert capfd.readouterr().out == expected
    assert evaluate_main(["full"]) == 2
