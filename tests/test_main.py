"""`python -m minilora`: what it prints, what it writes, and how it refuses."""

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    HubertConfig,
    HubertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    ViTConfig,
    ViTForImageClassification,
)

import minilora
from minilora.__main__ import inspection, main
from minilora.peft_format.apply import adapter_of
from minilora.summarization import cli
from tests.conftest import ARCHITECTURES, adapted, logits
from tests.helpers import byte_level_bpe


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny BART as a checkpoint."""
    return save_base("bart", tmp_path / "base")


def save_base(architecture: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    model = ARCHITECTURES[architecture].build()
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(directory)
    return directory


def save_adapted(architecture: str, base: Path, directory: Path, **changes: object) -> Path:
    model = adapted(architecture, **changes)
    with torch.no_grad():
        for parameter in minilora.trainable_parameters(model):
            parameter += 0.05
    model.name_or_path = str(base)
    minilora.save_adapter(model, directory)
    return directory


def load(architecture: str, directory: Path) -> PreTrainedModel:
    seq2seq = architecture in ("bart", "t5")
    kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    return kind.from_pretrained(directory, dtype=torch.float32).eval()


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("bart", {}),
        ("bart", {"dora": True, "bias": "all"}),
        ("bart", {"lora_bias": True}),
        ("t5", {}),
        ("gpt2", {}),
        ("llama", {"dora": True}),
    ],
)
def test_merge_writes_what_plain_transformers_loads(
    architecture: str,
    changes: dict[str, object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = save_base(architecture, tmp_path / "base")
    adapter = save_adapted(architecture, base, tmp_path / "adapter", **changes)
    capsys.readouterr()
    assert run("merge", adapter, tmp_path / "out") == 0
    printed, err = capsys.readouterr()
    assert "it/s" not in err, "a stray progress bar"
    assert "modules merged; rounding error at most" in printed
    assert "on a sample the checkpoint's outputs differ" in printed

    merged = load(architecture, tmp_path / "out")
    plain = load(architecture, base)
    before = logits(plain)
    assert set(merged.state_dict()) == set(plain.state_dict())
    minilora.load_adapter(plain, adapter)
    assert (logits(merged) - logits(plain)).abs().max() < 1e-4  # float32 rounds merged weights
    assert (logits(merged) - before).abs().max() > 0.1
    minilora.unwrap(plain)
    for key, tensor in plain.state_dict().items():
        assert torch.equal(merged.state_dict()[key], tensor)


@pytest.mark.parametrize(("flag", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_merge_rounds_once_into_the_dtype_asked_for(
    flag: str, dtype: torch.dtype, base: Path, tmp_path: Path
) -> None:
    adapter = save_adapted("bart", base, tmp_path / "adapter")
    assert run("merge", adapter, tmp_path / "out", "--dtype", flag) == 0
    written = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").state_dict()
    model = load("bart", base)
    minilora.load_adapter(model, adapter)
    for key, tensor in minilora.unwrap(model).state_dict().items():
        assert written[key].dtype == dtype
        assert torch.equal(written[key], tensor.to(dtype))


def test_merge_keeps_the_dtype_of_the_base(tmp_path: Path, capsys: Any) -> None:
    """The report is of the file: in bfloat16 more is lost than in float32."""
    base = save_base("bart", tmp_path / "base", torch.bfloat16)
    adapter = save_adapted("bart", base, tmp_path / "adapter")
    lost = []
    for dtype in ("fp32", "bf16"):
        assert run("merge", adapter, tmp_path / dtype, "--dtype", dtype) == 0
        found = re.search(r"at most (\S+) of an update lost", capsys.readouterr().out)
        assert found
        lost.append(float(found[1]))
    assert lost[1] > 100 * lost[0] > 0
    assert run("merge", adapter, tmp_path / "out") == 0
    written = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert {tensor.dtype for tensor in written.state_dict().values()} == {torch.bfloat16}


def test_merge_writes_a_tokenizer_that_pads_with_nothing(tmp_path: Path, capsys: Any) -> None:
    """Those of most causal models have no padding token."""
    base = save_base("llama", tmp_path / "base")
    tokenizer = byte_level_bpe()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    adapter = save_adapted("llama", base, tmp_path / "adapter")
    assert run("merge", adapter, tmp_path / "out") == 0
    assert "note:" not in capsys.readouterr().err
    written = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert written.pad_token is None
    assert written("Ann").input_ids == tokenizer("Ann").input_ids


def test_merge_says_that_it_takes_the_latest_revision(
    base: Path, tmp_path: Path, capsys: Any
) -> None:
    adapter = save_adapted("bart", base, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    entries = json.loads(path.read_text())
    path.write_text(json.dumps(entries | {"revision": "abc"}))
    assert run("merge", adapter, tmp_path / "out") == 0
    said = f"note: the adapter's base is revision abc of {base}, and the latest one is used: "
    assert said in capsys.readouterr().err
    path.write_text(json.dumps(entries | {"init_lora_weights": "loftq", "auto_mapping": None}))
    assert run("merge", adapter, tmp_path / "new") == 2
    assert f"{adapter} was started by PEFT's LoftQ: quantize" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_merge_adds_the_tied_head_that_the_base_s_config_does_not_name(tmp_path: Path) -> None:
    """The config.json of facebook/bart-base names BartModel."""
    base = save_base("bart", tmp_path / "base")
    adapter = save_adapted("bart", base, tmp_path / "adapter", task_type="SEQ_2_SEQ_LM")
    whole = load("bart", base)
    whole.model.save_pretrained(base)
    assert json.loads((base / "config.json").read_text())["architectures"] == ["BartModel"]
    assert run("merge", adapter, tmp_path / "out") == 0
    minilora.load_adapter(whole, adapter)
    assert (logits(load("bart", tmp_path / "out")) - logits(whole)).abs().max() < 1e-4


def test_merge_of_a_run_takes_the_model_from_its_config(base: Path, tmp_path: Path) -> None:
    save_adapted("bart", Path("of/another/machine"), tmp_path / "run" / "adapter")
    settings = {"model": str(base), "method": "lora"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    assert run("merge", tmp_path / "run", tmp_path / "out") == 0
    assert load("bart", tmp_path / "out")


SMALL = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24,
}  # fmt: skip
# The base's class, the task's, and what a classifier of PEFT's is asked for.
HEADLESS: dict[str, tuple[Any, Any, Any, dict[str, int]]] = {
    "SEQ_CLS": (BertModel, BertForSequenceClassification, BertConfig, {"num_labels": 3}),
    "SEQ_CLS, two layers": (
        RobertaForMaskedLM, RobertaForSequenceClassification, RobertaConfig, {"num_labels": 3}
    ),
    "SEQ_CLS, decoder": (
        LlamaForCausalLM, LlamaForSequenceClassification, LlamaConfig, {"num_labels": 3}
    ),
    "TOKEN_CLS": (RobertaForMaskedLM, RobertaForTokenClassification, RobertaConfig,
                  {"num_labels": 5}),
    "QUESTION_ANS": (BertForMaskedLM, BertForQuestionAnswering, BertConfig, {}),
}  # fmt: skip


@pytest.mark.parametrize("task", HEADLESS)
def test_merge_takes_the_head_of_a_task_from_peft_s_adapter(task: str, tmp_path: Path) -> None:
    """The usual case: the base knows no classes, and the adapter brings the head."""
    plain, kind, config, labels = HEADLESS[task]
    torch.manual_seed(0)
    plain(config(**SMALL, pad_token_id=0)).save_pretrained(tmp_path / "base")
    targets = ["q_proj"] if config is LlamaConfig else ["query"]
    settings = peft.LoraConfig(r=2, target_modules=targets, task_type=task.partition(",")[0])
    theirs = peft.get_peft_model(kind.from_pretrained(tmp_path / "base", **labels), settings)
    for parameter in minilora.trainable_parameters(theirs):
        parameter.data.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", tmp_path / "out") == 0
    merged = kind.from_pretrained(tmp_path / "out").eval()
    assert merged.config.num_labels == labels.get("num_labels", 2)
    inputs = {"input_ids": torch.tensor([[4, 5, 6, 7]])}
    with torch.no_grad():
        wanted, found = (model(**inputs)[0] for model in (theirs.eval(), merged))
        with theirs.disable_adapter():
            before = theirs(**inputs)[0]
    assert (wanted - before).abs().max() > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


SIZES = SMALL | {"image_size": 16, "patch_size": 8}
SOUND = SMALL | {
    "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_labels": 3,
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
OTHER_INPUTS: dict[str, Callable[[], Any]] = {
    "images": lambda: ViTForImageClassification(ViTConfig(**SIZES)),
    "sounds": lambda: HubertForSequenceClassification(HubertConfig(**SOUND)),
}


@pytest.mark.parametrize("name", OTHER_INPUTS)
def test_merge_compares_what_images_and_sounds_give(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers has no AutoModelForSequenceClassification of them: config.json names theirs."""
    torch.manual_seed(0)
    model = OTHER_INPUTS[name]()
    model.save_pretrained(tmp_path / "base")
    minilora.inject(model, minilora.LoRAConfig(rank=2, task_type="SEQ_CLS", init="random"))
    minilora.save_adapter(model, tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", tmp_path / "out", "--model", tmp_path / "base") == 0
    assert "on a sample the checkpoint's outputs differ from those of" in capsys.readouterr().out
    merged = type(model).from_pretrained(tmp_path / "out").state_dict()
    wanted = minilora.unwrap(model).state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in merged.items())


def test_merge_refuses_weights_that_overflow_in_16_bits(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load("bart", base)
    minilora.inject(model, minilora.LoRAConfig(rank=2, alpha=1e6, init="random"))
    minilora.save_adapter(model, tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", tmp_path / "out", "--dtype", "fp16") == 2
    assert "differ by nan: nothing is written; --dtype fp32 " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    assert run("merge", tmp_path / "adapter", tmp_path / "out", "--dtype", "bf16") == 0


def test_merge_refuses_a_base_that_lacks_more_than_the_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """BERT's pooler, which PEFT does not save."""
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    minilora.inject(model, minilora.LoRAConfig(rank=2, task_type="SEQ_CLS"))
    minilora.save_adapter(model, tmp_path / "adapter")
    capsys.readouterr()
    assert run("merge", tmp_path / "adapter", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "its weights lack 2 tensors (bert.pooler.dense.bias, ...)" in error
    assert not (tmp_path / "out").exists()


def test_merge_fills_an_empty_directory_and_does_not_replace_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the current directory, a mount point, or the target of a symbolic link."""
    adapter = save_adapted("bart", base, tmp_path / "adapter")
    place, link = tmp_path / "place", tmp_path / "link"
    place.mkdir()
    link.symlink_to(place)
    before = place.stat().st_ino
    monkeypatch.chdir(place)
    for out in (".", link):
        assert run("merge", adapter, out) == 0
        assert place.stat().st_ino == before
        assert load("bart", place).config.model_type == "bart"
        assert not list(place.glob(".*"))
        for path in place.iterdir():
            path.unlink()
    assert link.is_symlink()


def test_merge_refuses_in_one_line_and_leaves_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_adapted("bart", base, tmp_path / "adapter")
    nameless = tmp_path / "nameless"
    minilora.save_adapter(adapted("bart"), nameless)
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    (tmp_path / "file").write_text("")
    nowhere = save_adapted("bart", tmp_path / "no" / "such" / "model", tmp_path / "nowhere")
    unfit = save_base("gpt2", tmp_path / "gpt2")
    copies = [tmp_path / name for name in ("incomplete", "damaged", "anonymous")]
    for copy in copies:
        shutil.copytree(base, copy)
    incomplete, damaged, anonymous = copies
    settings = json.loads((anonymous / "config.json").read_text())
    (anonymous / "config.json").write_text(json.dumps(settings | {"architectures": None}))
    tensors = safetensors.torch.load_file(incomplete / "model.safetensors")
    del tensors["model.encoder.layers.0.fc1.weight"]
    safetensors.torch.save_file(tensors, incomplete / "model.safetensors", {"format": "pt"})
    (damaged / "model.safetensors").write_bytes(b"none")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()  # transformers' progress bars
    for arguments, message in [
        ([adapter, full], "not an empty directory"),
        ([adapter, tmp_path / "file"], "not an empty directory"),
        ([tmp_path / "nothing", tmp_path / "out"], "no such directory"),
        ([nameless, tmp_path / "out"], "pass --model"),
        ([nowhere, tmp_path / "out"], "no such directory"),
        ([adapter, tmp_path / "out", "--model", unfit], "no such module"),
        ([adapter, tmp_path / "out", "--model", incomplete], "its weights lack 1 tensor ("),
        ([adapter, tmp_path / "out", "--model", damaged], "damaged"),
        ([adapter, tmp_path / "out", "--model", anonymous], "config.json names no architecture"),
        (["~nobody-at-all/adapter", tmp_path / "out"], "no such directory"),
    ]:
        assert run("merge", *arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("minilora merge: ")
        assert error.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before


def test_inspect_shows_the_singular_values_of_the_update(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted("bart", bias="lora_only")
    minilora.save_adapter(model, tmp_path)
    assert run("inspect", tmp_path) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    adapter = adapter_of(model)
    assert len([line for line in lines if "q_proj " in line]) == 4
    for line in lines[2 : 2 + len(adapter.modules)]:
        module, rank, scale, _, _, norm, *values = line.split()
        A, B = adapter.pair(module)
        expected = torch.linalg.svdvals(7 / 3 * (B.double() @ A.double()))
        assert int(rank) == 3
        assert float(scale) == pytest.approx(7 / 3, rel=1e-3)
        assert float(norm) == pytest.approx(expected.norm().item(), rel=1e-3)
        assert [float(value) for value in values] == pytest.approx(expected[:3].tolist(), rel=5e-3)
    assert "self_attn.q_proj.base_layer.bias" in printed


def test_a_command_leaves_the_logger_as_it_was(tmp_path: Path) -> None:
    minilora.save_adapter(adapted(), tmp_path)
    log = logging.getLogger("minilora")
    before = log.level, list(log.handlers)
    assert run("inspect", tmp_path) == 0
    assert (log.level, log.handlers) == before


def test_inspect_shortens_many_singular_values() -> None:
    table = inspection(adapter_of(adapted("bart", rank=12, targets=("q_proj",))))
    assert all(line.split()[-2] == ".." for line in table.splitlines()[2:])


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_the_doors_of_the_task_are_forwarded(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(cli, f"{command}_main", lambda *words: calls.append(words) or 7)
    assert main([command, "RUN", "--help"]) == 7
    assert calls == [(["RUN", "--help"], f"minilora {command}")]


def test_no_command_and_an_unknown_one_are_answered_in_one_line(capfd: Any) -> None:
    for arguments, says in (([], "COMMAND"), (["fly"], "choose from"), (["merge"], "ADAPTER, OUT")):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert says in err


@pytest.mark.slow
def test_inspect_needs_no_transformers(tmp_path: Path) -> None:
    minilora.save_adapter(adapted("bart"), tmp_path)
    code = (
        "import sys; from minilora.__main__ import main; "
        f"assert main(['inspect', {str(tmp_path)!r}]) == 0; "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
