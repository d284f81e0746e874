"""Prompts and prefixes from the command line: trained, stopped, resumed, scored, read."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import PegasusConfig, PegasusForConditionalGeneration

import minilora
from minilora.__main__ import main
from minilora.methods import PrefixConfig, PromptConfig
from minilora.methods.prefix_tuning import PLACES
from minilora.summarization.cli import evaluate_main, train_main
from minilora.summarization.flags import parse_run
from minilora.summarization.presets import LEARNING_RATES, OTHER_RATES
from minilora.summarization.training.session import method_configs
from tests.helpers import SMALL, byte_level_bpe, save_bart, save_data
from tests.test_training import at_step, interrupt

METHODS = {
    "prompt": ["--method", "prompt", "--learning-rate", "0.5"],
    "prefix": ["--method", "prefix", "--prefix-hidden", "16", "--learning-rate", "0.1"],
    "lora_prompt": ["--with", "prompt", "--learning-rate", "0.1"],
    "lora_prefix": ["--with", "prefix", "--prefix-hidden", "0", "--learning-rate", "0.1"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("virtual")
    save_bart(folder / "bart")
    save_data(folder / "data")
    return folder


def flags(folder: Path, *more: object) -> list[str]:
    base = ["--model", str(folder / "bart"), "--data", str(folder / "data"), *SMALL]
    return [*base, "--rank", "3", "--virtual-tokens", "4", *map(str, more)]


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Path]:
    """Whole runs of eight steps."""
    for name, method in METHODS.items():
        assert train_main(flags(folder, *method, "--output", folder / name)) == 0
    return {name: folder / name for name in METHODS}


def files(run: Path) -> dict[str, bytes]:
    found = sorted((run / "adapter").rglob("*.*"))
    return {str(path.relative_to(run)): path.read_bytes() for path in found}


def test_each_part_lies_in_its_directory_and_the_card_above(runs: dict[str, Path]) -> None:
    both = ("adapter_config.json", "adapter_model.safetensors")
    for name, run in runs.items():
        part = "prompt" if "prompt" in name else "prefix"
        expected = {f"adapter/{part}/{file}" for file in both} | {"adapter/README.md"}
        expected |= {f"adapter/{file}" for file in both if "lora" in name}
        assert set(files(run)) == expected


@pytest.mark.parametrize("step", [2, 5, 8])
@pytest.mark.parametrize("name", METHODS)
def test_stopped_and_resumed_it_ends_with_the_same_bits(
    folder: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: Any, name: str, step: int
) -> None:
    """The MLP of a prefix too, which the adapter's files do not hold."""
    at_step(monkeypatch, step, lambda: interrupt(signal.SIGINT))
    run = tmp_path / "run"
    assert train_main(flags(folder, *METHODS[name], "--output", run)) == 130
    assert train_main(["--resume", str(run)]) == 0
    assert files(run) == files(runs[name])
    scores = [json.loads((r / "evaluation.json").read_text()) for r in (run, runs[name])]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("name", METHODS)
def test_it_is_scored_again_as_at_its_end(
    folder: Path, runs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """The run, and the adapter alone; summaries differ from the base's."""
    before = json.loads((runs[name] / "evaluation.json").read_text())
    out = tmp_path / "scores.json"
    assert evaluate_main([str(runs[name]), "--output", str(out)]) == 0
    assert json.loads(out.read_text()) == before
    texts = [(one["base"], one["finetuned"]) for one in before["examples"]]
    assert any(base != tuned for base, tuned in texts)
    alone = tmp_path / "adapter"
    shutil.copytree(runs[name] / "adapter", alone)
    same = ["--data", str(folder / "data"), "--model", str(folder / "bart"), "--beams", "2"]
    assert evaluate_main([str(alone), *same, "--output", str(out)]) == 0
    shown = json.loads(out.read_text())["examples"]
    assert any(one["base"] != one["finetuned"] for one in shown)


@pytest.mark.parametrize("inside", ["", "adapter"])
@pytest.mark.parametrize("name", METHODS)
def test_no_run_starts_from_it(
    folder: Path, runs: dict[str, Path], tmp_path: Path, capsys: Any, name: str, inside: str
) -> None:
    start = ["--adapter", str(runs[name] / inside), "--data", str(folder / "data")]
    assert train_main([*start, "--output", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    part = "prompt" if "prompt" in name else "prefix"
    assert line.endswith(f" holds a {part}: a run starts from LoRA only")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", METHODS)
def test_it_is_inspected_and_not_merged(
    runs: dict[str, Path], tmp_path: Path, capsys: Any, name: str
) -> None:
    part = "prompt" if "prompt" in name else "prefix"
    assert main(["inspect", str(runs[name])]) == 0
    assert f"{part} of 4 tokens" in capsys.readouterr().out
    assert main(["merge", str(runs[name]), str(tmp_path / "merged")]) == 2
    assert f"a {part} cannot be merged" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_own_chats_are_summarized(runs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    chat = tmp_path / "chat.txt"
    chat.write_text("Ann: hi\nBob: hello")
    for run in runs.values():
        assert evaluate_main([str(run), "--text", str(chat), "--base"]) == 0
        assert "fine-tuned" in capsys.readouterr().out


def test_a_file_of_chats_is_summarized(runs: dict[str, Path], tmp_path: Path) -> None:
    chats, out = tmp_path / "chats.jsonl", tmp_path / "summaries.jsonl"
    chats.write_text(json.dumps({"dialogue": "Ann: hi\nBob: hello"}) + "\n")
    for run in runs.values():
        out.unlink(missing_ok=True)
        assert evaluate_main([str(run), "--predict", str(chats), "--output", str(out)]) == 0
        assert len(out.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("lora_prompt", ["--with", "prefix"], "--with (was 'prompt', is 'prefix')"),
        ("lora_prefix", ["--with", "none"], "--with (was 'prefix', is 'none')"),
        ("prompt", ["--method", "prefix"], "--method (was 'prompt', is 'prefix')"),
        ("prefix", ["--prefix-places", "decoder"], "--prefix-places (was"),
        ("prompt", ["--virtual-tokens", "5"], "--virtual-tokens (was 4, is 5)"),
    ],
)
def test_a_run_goes_on_as_it_began(
    runs: dict[str, Path], capsys: Any, name: str, more: list[str], says: str
) -> None:
    before = files(runs[name])
    assert train_main(["--resume", str(runs[name]), *more]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert files(runs[name]) == before


@pytest.mark.parametrize("method", [["--method", "prompt"], ["--with", "prefix"]])
def test_another_kind_of_model_is_refused(
    folder: Path, tmp_path: Path, capsys: Any, method: list[str]
) -> None:
    """A Pegasus has BART's parts, but not its positions."""
    sizes = {f"{side}_{n}": 1 for side in ("encoder", "decoder") for n in ("layers", "ffn_dim")}
    sizes |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    config = PegasusConfig(vocab_size=400, d_model=16, max_position_embeddings=64, **sizes)
    PegasusForConditionalGeneration(config).save_pretrained(tmp_path / "pegasus")
    byte_level_bpe().save_pretrained(tmp_path / "pegasus")
    argv = flags(folder, *method, "--output", tmp_path / "run")
    assert train_main([*argv, "--model", str(tmp_path / "pegasus")]) == 2
    err = capsys.readouterr().err
    assert "needs a BART, mBART, T5 or Llama, not PegasusForConditionalGeneration" in err
    assert not (tmp_path / "run").exists()


def test_the_flags_are_the_configurations(folder: Path) -> None:
    def configs(*more: str) -> list[Any]:
        return method_configs(parse_run(flags(folder, *more)))

    prefix = PrefixConfig(4)  # with the MLP of the library
    assert configs("--method", "prompt") == [PromptConfig(4)]
    assert configs("--method", "prefix") == [prefix]
    (lora, beside) = configs("--with", "prefix", "--prefix-places", "decoder")
    assert (lora.rank, beside) == (3, PrefixConfig(4, "decoder", 512))
    assert configs("--method", "prefix", "--prefix-hidden", "0") == [PrefixConfig(4, PLACES, None)]
    assert configs("--with", "prompt", "--method", "adalora")[1] == PromptConfig(4)
    run = parse_run(["--method", "prompt"])
    assert parse_run(["--method", "prefix"]).training.learning_rate != run.training.learning_rate
    plain = parse_run(["--method", "prefix", "--prefix-hidden", "0"])
    assert plain.training.learning_rate == LEARNING_RATES["pocket"]["plain prefix"]
    other = ["--method", "prefix", "--prefix-hidden", "0", "--preset", "bart-base-samsum"]
    assert parse_run(other).training.learning_rate == OTHER_RATES["prefix"]


def test_a_prompt_leaves_its_positions_to_itself(folder: Path, tmp_path: Path) -> None:
    """The model reads 512 tokens: dialogues are cut to what the prompt leaves."""
    from minilora.summarization.model.requirements import limit_lengths
    from minilora.summarization.training.session import open_session

    for name, source, target in (("prompt", 4, 0), ("prefix", 0, 4)):
        run = parse_run(flags(folder, "--method", name, "--prefix-hidden", "0"))
        run.data.max_source_length = run.data.max_target_length = 10_000
        session = open_session(run)
        positions = session.model.config.max_position_embeddings
        assert session.run.data.max_source_length == positions - source
        assert session.run.data.max_target_length == positions - target
        minilora.unload(session.model)
        assert limit_lengths(run, session.model).data.max_source_length == positions - source


@pytest.mark.parametrize(
    ("flags_", "says"),
    [
        (["--with", "prompt", "--method", "full"], "--with is for LoRA, not --method full"),
        (["--with", "prompt", "--method", "prefix"], "--with is for LoRA, not --method prefix"),
        (
            ["--lora-plus-ratio", "4", "--method", "prompt"],
            "--lora-plus-ratio requires --method lora, qlora or adalora",
        ),
        (["--virtual-tokens", "0"], "--virtual-tokens must be above 0, not 0"),
        (["--method", "prefix", "--prefix-places", "heart"], "places must be some of encoder"),
        (["--method", "prompt", "--virtual-tokens", "9999"], "9999 virtual tokens take all"),
        (
            ["--with", "prefix", "--compile"],
            "--compile does not go with a prefix: leave the flag out",
        ),
        (["--with", "chants"], "invalid choice: 'chants'"),
    ],
)
def test_what_makes_no_sense_ends_in_one_line(
    folder: Path, tmp_path: Path, capsys: Any, flags_: list[str], says: str
) -> None:
    run = tmp_path / "run"
    try:
        code = train_main([*flags(folder), *flags_, "--output", str(run)])
    except SystemExit as error:
        code = error.code
    assert code == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not run.exists()
