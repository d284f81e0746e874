"""The model card of a run's adapter: true, runnable, and without the folders of its owner."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSeq2SeqLM

import minilora
from minilora.summarization.cli import train_main
from minilora.summarization.settings import RunConfig
from minilora.summarization.training.card import card, write_card
from tests.helpers import SMALL, save_bart, save_data

SCORES = {"rouge1": 41.237, "rouge2": 20.5, "rougeL": 30.0, "rougeLsum": 31.0}
EVALUATION = {"n": 1234, "split": "test", "base": SCORES, "finetuned": SCORES | {"rouge1": 52.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a folder whose name nobody but its owner needs to know."""
    folder = tmp_path_factory.mktemp("secret")
    save_bart(folder / "bart")
    save_data(folder / "chats")
    argv = ["--model", folder / "bart", "--data", folder / "chats", "--output", folder / "run"]
    assert train_main([*map(str, argv), *SMALL, "--epochs", "2", "--learning-rate", "0.02"]) == 0
    return folder


def run_of(**flat: Any) -> RunConfig:
    return RunConfig.from_dict(flat)


def front(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text.split("---\n")[1]))


def test_the_card_has_the_scores_of_the_run_and_no_folder(folder: Path) -> None:
    text = (folder / "run/adapter/README.md").read_text()
    evaluation = json.loads((folder / "run/evaluation.json").read_text())
    for name in SCORES:
        base, tuned = (evaluation[side][name] for side in ("base", "finetuned"))
        assert f"| {name} | {base:.2f} | {tuned:.2f} |\n" in text
    assert "# bart, fine-tuned on chats\n" in text
    assert folder.name not in text
    assert front(text).keys() == {"library_name", "pipeline_tag", "tags"}


def test_the_code_of_the_card_loads_the_adapter_with_peft_and_with_minilora(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in one model each, from the folders that the card does not name."""
    pytest.importorskip("peft")
    text = (folder / "run/adapter/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    start, peft, ours = code.replace('"ADAPTER"', '"run/adapter"').split("\n\n")
    monkeypatch.chdir(folder)
    ids = torch.tensor([[0, 5, 6, 7, 2]])
    outputs = []
    for way in ("", peft, ours):
        names: dict[str, Any] = {}
        exec(f"{start}\n{way}", names)
        with torch.no_grad():
            outputs.append(names["model"].eval()(input_ids=ids).logits)
    base, theirs, mine = outputs
    assert torch.equal(theirs, mine)  # the order of the sums is PEFT's
    assert not torch.equal(base, mine)


METHODS: dict[str, tuple[list[str], str, str | None]] = {
    # flags; what the card says; the directory that PEFT reads, or None
    "adalora": (["--method", "adalora"], "AdaLoRA of mean rank 3, alpha 32.", ""),
    "prompt": (["--method", "prompt"], "A prompt of 4 tokens.", "/prompt"),
    "prefix": (["--method", "prefix"], "A prefix of 4 tokens.", None),
    "prefix of the decoder": (
        ["--method", "prefix", "--prefix-places", "decoder"],
        "A prefix of 4 tokens.",
        "/prefix",
    ),
    "LoRA and a prompt": (
        ["--with", "prompt"],
        "LoRA of rank 3 with a prompt of 4 tokens, alpha 32.",
        None,
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_card_of_another_method_loads_it_with_peft_where_peft_can(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    flags, how, inside = METHODS[name]
    argv = ["--model", folder / "bart", "--data", folder / "chats", "--output", tmp_path / "run"]
    more = ["--rank", "3", "--virtual-tokens", "4", "--learning-rate", "0.1", "--no-evaluate"]
    assert train_main([*map(str, argv), *SMALL, *more, *flags]) == 0
    text = (tmp_path / "run/adapter/README.md").read_text()
    assert f"\n\n{how}\n\n" in text
    lora = "LoRA" in how
    tags = [*(["lora"] if lora else []), *(f"{k}-tuning" for k in ("prompt", "prefix") if k in how)]
    assert front(text)["tags"] == [*tags, "minilora"]
    assert front(text)["library_name"] == ("minilora" if inside is None else "peft")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    start, *ways = code.replace('"ADAPTER', f'"{tmp_path}/run/adapter').split("\n\n")
    assert len(ways) == (1 if inside is None else 2)
    assert inside is None or f'run/adapter{inside}")' in ways[0]
    monkeypatch.chdir(folder)
    ids, outputs = torch.tensor([[0, 5, 6, 7, 2]]), []
    for way in ("", *ways):
        names: dict[str, Any] = {}
        exec(f"{start}\n{way}", names)
        with torch.no_grad():
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            outputs.append(names["model"].eval()(**inputs, decoder_input_ids=ids).logits)
    base, *tuned = outputs
    assert (tuned[0] - tuned[-1]).abs().max() < 1e-4  # float32; PEFT's order is another one
    assert (tuned[-1] - base).abs().max() > 1e-2


def test_a_run_that_is_resumed_ends_with_the_same_card(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in (folder / "run/adapter").iterdir()}
    assert before.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert train_main(["--resume", str(folder / "run")]) == 0
    assert {path.name: path.read_bytes() for path in (folder / "run/adapter").iterdir()} == before


def test_an_adapter_that_is_not_scored_says_so(folder: Path, tmp_path: Path) -> None:
    """As long as the run trains; the scores of an older adapter do not stay."""
    argv = ["--model", folder / "bart", "--data", folder / "chats", "--output", tmp_path]
    assert train_main([*map(str, argv), *SMALL, "--max-steps", "1", "--no-evaluate"]) == 0
    path = tmp_path / "adapter/README.md"
    assert "Not scored yet." in path.read_text()
    write_card(run_of(), path.parent, EVALUATION)
    assert "| 1,234 dialogues of test, F1 x 100 | base | fine-tuned |" in path.read_text()
    assert "| rouge1 | 41.24 | 52.00 |" in path.read_text()
    write_card(run_of(), path.parent)
    assert "Not scored yet." in path.read_text()
    assert "rouge1" not in path.read_text()


def test_the_head_names_what_is_on_the_hub() -> None:
    text = card(run_of(model="facebook/bart-base", data="knkarthick/samsum", rank=4), None)
    wanted = {"base_model": "facebook/bart-base", "datasets": "knkarthick/samsum"}
    assert front(text).items() >= wanted.items()
    assert front(card(run_of(model="t5-small"), None))["base_model"] == "t5-small"
    assert "LoRA of rank 4, alpha 32." in text
    assert "four bits" not in text
    assert "minilora.quantize(model)" in card(run_of(method="qlora"), None)
    assert "Every dialogue stands between" not in text
    prompted = card(run_of(prompt_before="Summarize:\\n"), None)
    assert "Every dialogue stands between 'Summarize:\\n' and ''." in prompted


def test_what_is_local_loses_its_folder_and_any_name_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("models/bart", "a.jsonl", "b {0}.jsonl"):
        (tmp_path / name).mkdir(parents=True)
    gone = "/home/ann/gone/c\udcff.jsonl"
    files = {"train_file": "a.jsonl", "validation_file": str(tmp_path / "b {0}.jsonl")}
    run = run_of(model="models/bart", **files, test_file=gone)
    write_card(run, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "# bart, fine-tuned on a.jsonl, b {0}.jsonl, c?.jsonl\n" in text
    assert "base_model" not in front(text)
    assert "/home/ann" not in text


def test_a_local_base_is_named_by_a_path_and_the_card_says_so(folder: Path) -> None:
    """PEFT's AutoPeftModel finds it from any folder, on this machine."""
    text = (folder / "run/adapter/README.md").read_text()
    config = json.loads((folder / "run/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "bart")
    assert "`base_model_name_or_path` is a path on the machine" in text
    hub = card(run_of(model="facebook/bart-base"), None)
    assert "base_model_name_or_path" not in hub


def test_an_embedded_model_is_known_by_its_name() -> None:
    assert "# pocket-bart, fine-tuned on bookings\n" in card(run_of(), EVALUATION)


def test_peft_s_own_files_are_not_touched(folder: Path, tmp_path: Path) -> None:
    """Whoever saves the adapter from a program gets the two files only."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "bart")
    minilora.load_adapter(model, folder / "run/adapter")
    minilora.save_adapter(model, tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        assert path.read_bytes() == (folder / "run/adapter" / path.name).read_bytes()
