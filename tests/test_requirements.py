"""Encoder-decoders as they come: a run is right on each, or ends in one line before it starts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import processors
from transformers import BartForConditionalGeneration, PreTrainedModel

import minilora
from minilora.summarization.cli import evaluate_main, train_main
from minilora.summarization.model.requirements import check
from tests.helpers import as_jsonl, byte_level_bpe, dialogues, save_bart, small_bart, write

# Toys ---------------------------------------------------------------------------------------------

SIDES = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
}
TOKENS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
BART = SIDES | TOKENS | {"vocab_size": 400, "d_model": 16, "max_position_embeddings": 64}
T5 = TOKENS | {"vocab_size": 400, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1}
T5 |= {"num_heads": 2, "num_decoder_layers": 1, "decoder_start_token_id": 1}
SWITCH = T5 | {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 2}
PROPHET = {"hidden_size": 16, "num_encoder_layers": 1, "num_decoder_layers": 1}
PROPHET |= {"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2}
PROPHET |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64}
BERT = {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 24, "max_position_embeddings": 64}
MOE = {"num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 1}
GEMMA = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
GEMMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
LED = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}

PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "BART": ("Bart", BART),
    "mBART": ("MBart", BART),
    "PLBart": ("PLBart", BART),
    "Pegasus": ("Pegasus", BART),
    "Pegasus-X": ("PegasusX", BART),
    "BigBird-Pegasus": ("BigBirdPegasus", BART | {"attention_type": "original_full"}),
    "LED": ("LED", BART | LED | {"attention_window": [8]}),
    "Marian": ("Marian", BART),
    "M2M100": ("M2M100", BART),
    "NLLB-MoE": ("NllbMoe", BART | MOE),
    "Blenderbot": ("Blenderbot", BART),
    "Blenderbot Small": ("BlenderbotSmall", BART),
    "T5": ("T5", T5),
    "mT5": ("MT5", T5),
    "UMT5": ("UMT5", T5),
    "LongT5": ("LongT5", T5 | {"local_radius": 4}),
    "Switch": ("SwitchTransformers", SWITCH),
    "ProphetNet": ("ProphetNet", PROPHET | TOKENS | {"vocab_size": 400, "pad_token_id": 0}),
}


def plain(kind: str, settings: dict[str, Any]) -> PreTrainedModel:
    names = (f"{kind}ForConditionalGeneration", f"{kind}MTModel")
    found = next(getattr(transformers, n) for n in names if hasattr(transformers, n))
    model: PreTrainedModel = found(getattr(transformers, f"{kind}Config")(**settings))
    return model


def composed(side: str, settings: dict[str, Any], start: int | None = 0) -> PreTrainedModel:
    """Two encoders made into an encoder-decoder, with the tokens that the user has to set."""
    sides = [getattr(transformers, f"{side}Config")(**settings) for _ in range(2)]
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*sides)
    config.decoder_start_token_id = start
    return transformers.EncoderDecoderModel(config=config)


def gemma() -> PreTrainedModel:
    side = transformers.models.t5gemma.configuration_t5gemma.T5GemmaModuleConfig(**GEMMA)
    config = transformers.T5GemmaConfig(encoder=side, decoder=side, vocab_size=400)
    return transformers.T5GemmaForConditionalGeneration(config)


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "T5Gemma":
        return gemma()
    if name == "BERT to BERT":
        return composed("Bert", BERT)
    if name == "RoBERTa to RoBERTa":
        return composed("Roberta", BERT | {"pad_token_id": 1})
    return plain(*PLAIN[name])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, count, start in (("train", 8, 0), ("validation", 2, 50), ("test", 2, 70)):
        rows = dialogues(count, start)
        rows[0]["dialogue"] += "\nAnn: see you then!" * 20  # longer than 64 positions
        write(folder / f"{split}.jsonl", as_jsonl(rows))
    return folder


FLAGS = [
    *("--batch-size", "4", "--epochs", "2", "--precision", "fp32", "--device", "cpu"),
    *("--learning-rate", "0.01", "--targets", "all-linear", "--rank", "2", "--no-report"),
    *("--beams", "2", "--min-length", "0", "--max-length", "12"),
]


def train(model: Path, data: Path, *more: object) -> int:
    argv = ["--model", model, "--data", data, "--output", model.parent / "run", *FLAGS, *more]
    return train_main(list(map(str, argv)))


# The encoders' pooler; what LED needs for global attention.
UNUSED = ("BERT to BERT", "RoBERTa to RoBERTa", "LED")


@pytest.mark.parametrize("name", [*PLAIN, "T5Gemma", "BERT to BERT", "RoBERTa to RoBERTa"])
def test_every_architecture_trains_and_is_scored(
    name: str, data: Path, tmp_path: Path, capsys: Any
) -> None:
    tokenizer = byte_level_bpe()
    if name == "ProphetNet":  # transformers takes 0 for granted
        tokenizer.pad_token = "<s>"
    build(name).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert train(tmp_path / "model", data) == 0
    found = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert found["n"] == 2
    unused = capsys.readouterr().err.count(", no gradient: ")
    assert unused == (name in UNUSED)


@pytest.mark.parametrize("name", ["T5", "LED", "BERT to BERT"])
def test_the_default_targets_are_on_both_sides(
    name: str, data: Path, tmp_path: Path, capsys: Any
) -> None:
    build(name).save_pretrained(tmp_path / "model")
    byte_level_bpe().save_pretrained(tmp_path / "model")
    more = ["--targets", "attention", "--max-steps", "1", "--no-evaluate"]
    assert train(tmp_path / "model", data, *more) == 0
    assert "is adapted" not in capsys.readouterr().err
    names = minilora.read_adapter(tmp_path / "run/adapter").modules
    assert {name.split(".")[name.split(".")[0] in ("model", "led")] for name in names} == {
        "encoder",
        "decoder",
    }


def test_a_side_that_is_not_adapted_is_said(data: Path, tmp_path: Path, capsys: Any) -> None:
    build("LED").save_pretrained(tmp_path / "model")
    byte_level_bpe().save_pretrained(tmp_path / "model")
    more = ["--targets", "q_proj", "v_proj", "--max-steps", "1", "--no-evaluate"]
    assert train(tmp_path / "model", data, *more) == 0
    assert capsys.readouterr().err.count("note: nothing in the encoder is adapted: ") == 1


# Configurations -----------------------------------------------------------------------------------


def configure(folder: Path, config: dict[str, Any], generation: dict[str, Any]) -> Path:
    """A toy BART that begins with <s>, whose files say so."""
    save_bart(folder)
    beginning = {"forced_bos_token_id": 0} | generation
    for name, changes in (("config.json", config), ("generation_config.json", beginning)):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


NO_START = {"decoder_start_token_id": None}
SET_RIGHT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "start only in config.json": ({}, NO_START, "decoder_start_token_id None; training"),
    "start only in the other": (NO_START, {}, ""),
    "two starts": ({}, {"decoder_start_token_id": 0}, "decoder_start_token_id 0; training"),
    "another end": ({"eos_token_id": 7}, {"eos_token_id": 7}, "eos_token_id 7; training"),
    "several ends": ({}, {"eos_token_id": [7, 2]}, ""),
    "no end": ({"eos_token_id": None}, {"eos_token_id": None}, "eos_token_id None; training"),
    "no padding": (
        {"pad_token_id": None},
        {"pad_token_id": None},
        "pad_token_id None; training and",
    ),
    "another padding": ({}, {"pad_token_id": 3}, "pad_token_id 3; training"),
    "another beginning": ({}, {"forced_bos_token_id": 5}, "forced_bos_token_id 5; training"),
    "static cache": ({}, {"cache_implementation": "static"}, "cache_implementation static"),
    "groups": ({}, {"num_beam_groups": 2, "diversity_penalty": 0.5}, "num_beam_groups 2"),
    "stop strings": ({}, {"stop_strings": ["x"]}, "stop_strings"),
    "prompt lookup": ({}, {"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens 3"),
    "contrastive": ({}, {"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha 0.6"),
    "DoLa": ({}, {"dola_layers": "high"}, "dola_layers high"),
    "guidance": ({}, {"guidance_scale": 2.0}, "guidance_scale 2.0"),
    "penalty": ({}, {"repetition_penalty": 2.5}, "repetition_penalty 2.5"),
    "sampling": ({}, {"do_sample": True, "temperature": 0.7}, "asks for sampling"),
    "the flags decide": ({}, {"num_beams": 5, "min_length": 56, "length_penalty": 2.0}, ""),
    "of config.json": ({"num_beams": 5, "min_length": 56}, {}, ""),
}


@pytest.fixture(scope="module")
def plain_scores(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("plain")
    assert train(configure(folder / "model", {}, {}), data) == 0
    return json.loads((folder / "run/evaluation.json").read_text())


@pytest.mark.parametrize("name", SET_RIGHT)
def test_what_can_be_set_right_is_and_said_once(
    name: str, data: Path, tmp_path: Path, capsys: Any, plain_scores: dict[str, Any]
) -> None:
    """The very same summaries as of the toy that says everything right."""
    config, generation, says = SET_RIGHT[name]
    model = configure(tmp_path / "model", config, generation)
    assert train(model, data) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "config" in line]
    assert [says in line for line in notes] == [True] * bool(says)
    for side in ("base", "finetuned"):
        found = json.loads((tmp_path / "run/evaluation.json").read_text())
        assert [row[side] for row in found["examples"]] == [
            row[side] for row in plain_scores["examples"]
        ]
    assert evaluate_main([str(tmp_path / "run"), "--device", "cpu"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "config" in line]
    assert [says in line for line in notes] == [True] * bool(says)


def test_a_checkpoint_cannot_suppress_the_end() -> None:
    model, tokenizer = build("BART"), byte_level_bpe()
    model.generation_config.suppress_tokens = [2, 7]
    (notice,) = [n for n in check(model, tokenizer, "toy") if "suppress" in n]
    assert "the token that ends a summary" in notice
    assert model.generation_config.suppress_tokens == [7]


def without_ends() -> Any:
    """A tokenizer that puts nothing around a text."""
    tokenizer = byte_level_bpe()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    return tokenizer


def prophet_net() -> tuple[PreTrainedModel, Any]:
    kind, settings = PLAIN["ProphetNet"]
    return plain(kind, settings | {"pad_token_id": 1}), byte_level_bpe()


def no_end() -> tuple[PreTrainedModel, Any]:
    tokenizer = without_ends()
    tokenizer.eos_token = None
    return build("BART"), tokenizer


def no_padding() -> tuple[PreTrainedModel, Any]:
    tokenizer = byte_level_bpe()
    tokenizer.pad_token = None
    return build("BART"), tokenizer


REFUSED = {
    "BART without a start": (
        lambda: (plain("Bart", BART | NO_START), byte_level_bpe()),
        "no decoder_start_token_id",
    ),
    "T5 without a start": (
        lambda: (plain("T5", T5 | NO_START), byte_level_bpe()),
        "no decoder_start_token_id",
    ),
    "BERT without a start": (
        lambda: (composed("Bert", BERT, start=None), byte_level_bpe()),
        "no decoder_start_token_id",
    ),
    "a start that is no token": (
        lambda: (plain("Bart", BART | {"decoder_start_token_id": 9999}), byte_level_bpe()),
        "its decoder_start_token_id is 9999, but it has 400 tokens",
    ),
    "no end": (no_end, "no eos_token"),
    "no padding": (no_padding, "no pad token"),
    "what transformers cannot decode": (prophet_net, "prophetnet model cannot write summaries"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_nothing_decides_is_refused_before_training(
    name: str, data: Path, tmp_path: Path, capsys: Any
) -> None:
    make, says = REFUSED[name]
    for part in make():
        part.save_pretrained(tmp_path / "model")
    capsys.readouterr()  # the bars of writing
    assert train(tmp_path / "model", data) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert len(err) == 1
    assert says in err[0]
    assert not (tmp_path / "run").exists()


def test_a_summary_ends_though_the_tokenizer_ends_no_text(
    data: Path, tmp_path: Path, capsys: Any
) -> None:
    """Trained to stop, it stops: all summaries are shorter than the 40 tokens they may have."""
    small_bart(init_std=0.02).save_pretrained(tmp_path / "model")
    without_ends().save_pretrained(tmp_path / "model")
    more = ["--method", "full", "--epochs", "30", "--max-length", "40", "--learning-rate", "0.01"]
    assert train(tmp_path / "model", data, *more) == 0
    assert capsys.readouterr().err.count("tokenizer adds no end token: </s> is added") == 1
    found = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert found["finetuned"]["gen_len"] < 35
    saved = BartForConditionalGeneration.from_pretrained(tmp_path / "run/model")
    assert saved.generation_config.eos_token_id == 2
