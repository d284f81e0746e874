"""Scores against rouge_score, intervals against theory, summaries against plain generate."""

import copy
import json
import logging
import math
import os
import re
import statistics
import time
import warnings
from pathlib import Path

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

import minilora
from minilora.summarization import files
from minilora.summarization.data.batches import Encoded
from minilora.summarization.data.reading import Example
from minilora.summarization.errors import UserError
from minilora.summarization.evaluation import compare, generate, rouge
from minilora.summarization.settings import GenerationOptions
from tests.helpers import BASE, EXAMPLES, TUNED

VOCABULARY = 60
GREEDY = GenerationOptions(beams=1, min_length=3, max_length=16, evaluation_batch_size=4)
BEAMS = GenerationOptions(beams=3, min_length=3, max_length=16, evaluation_batch_size=4)


def make_model(seed: int = 0, **config: object) -> BartForConditionalGeneration:
    torch.manual_seed(seed)
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=16,
            encoder_layers=2,
            decoder_layers=1,  # unlike the encoder's: the cache must not take its size from there
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=64,
            init_std=0.7,  # far from uniform: summaries differ and end at different lengths
            **config,
        )
    )
    model.generation_config.forced_bos_token_id = 0
    # what bart-large-cnn ships; none of it may have a say
    model.generation_config.update(
        min_length=14, max_length=18, length_penalty=2.0, num_beams=5, early_stopping=True
    )
    return model.train()


@pytest.fixture
def model() -> BartForConditionalGeneration:
    return make_model()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(4, VOCABULARY))]
    fast = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@pytest.fixture
def encoded() -> list[Encoded]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i, length in enumerate([5, 19, 3, 11, 30, 7, 2, 23, 13]):
        words = torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()
        rows.append(Encoded(f"d{i}", [0, *words, 2], [0, 4, 2]))
    return rows


def examples_for(encoded: list[Encoded]) -> list[Example]:
    return [
        Example(row.id, f"Ann: hi\nBob: {row.id}", f"w{4 + i} w5") for i, row in enumerate(encoded)
    ]


def plain_generate(model, tokenizer, row: Encoded, options: GenerationOptions) -> compare.Summary:
    """One dialogue, unpadded, stock cache."""
    model = copy.deepcopy(model).eval()
    beams = {"early_stopping": True, "length_penalty": options.length_penalty}
    output = model.generate(
        input_ids=torch.tensor([row.source]),
        attention_mask=torch.ones(1, len(row.source), dtype=torch.long),
        num_beams=options.beams,
        min_length=options.min_length,
        max_length=options.max_length,
        no_repeat_ngram_size=options.no_repeat_ngram,
        **(beams if options.beams > 1 else {}),
    )
    text = tokenizer.decode(output[0], skip_special_tokens=True).strip()
    return compare.Summary(text, output.shape[1])


# Sentences ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Ann left. Bob stayed! Why? Nobody knows…", 4),
        ('She said "Go." He went. "Now?" Yes.', 4),
        ("Mr. Smith and Dr. Who met Mrs. Jones.", 1),
        ("They like fruit, e.g. Apples, i.e. Food.", 1),
        ("J. K. Rowling wrote it. J.R.R. Tolkien did not.", 2),
        ("It costs 3.5 dollars. Too much.", 2),
        ("They meet at 5 p.m. on Monday.", 1),
        ("They meet at 5 p.m. Anna brings cake.", 2),
        ("The U.S. Army came.", 1),
        ("wait... what? no. ok", 1),
        ("Yahoo! is old. It was big.", 2),
        ("Él se fue. ¿Por qué? Élodie lo sabe.", 3),
        ("Анна ушла. Борис остался.", 2),
        ("安娜走了。鲍勃留下了！为什么？", 3),
        ("line one\nline two. Line three", 3),
        ("Great! 😂 Bye.", 1),
        ("No mark at the end", 1),
        ("", 0),
        (" \n ", 0),
    ],
)
def test_sentences(text: str, sentences: int) -> None:
    split = rouge.split_sentences(text)
    assert len(split.splitlines()) == sentences
    assert "".join(split.split()) == "".join(text.split())  # nothing lost, nothing added


@pytest.mark.parametrize(
    ("part", "times", "sentences"),
    [
        (".", 200_000, 1),
        (". ", 100_000, 1),
        ('."', 100_000, 1),
        ("a. A", 50_000, 50_001),
        ("Mr. ", 50_000, 1),
        (" ", 200_000, 0),
    ],
)
def test_sentences_of_a_long_hostile_line_take_linear_time(
    part: str, times: int, sentences: int
) -> None:
    """A quadratic reading of 200,000 characters would take minutes; this one takes 0.1 s."""
    text, started = part * times, time.process_time()
    split = rouge.split_sentences(text)
    assert time.process_time() - started < 30
    assert len(split.splitlines()) == sentences
    assert "".join(split.split()) == "".join(text.split())


# ROUGE --------------------------------------------------------------------------------------------

PAIRS = [
    ("Ann is buying two cakes. Bob pays.", "Bob paid for Ann's cakes. They are going home."),
    ("Bob pays. Ann is buying two cakes.", "Ann buys two cakes. Bob pays."),
    ("", "Ann buys cakes."),
    ("Ann buys cakes.", ""),
    ("😂😂", "😂"),
    ("Ann buys cakes.", "Ann buys cakes."),
]


def test_rouge_equals_rouge_score() -> None:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    found = rouge.rouge([p for p, _ in PAIRS], [r for _, r in PAIRS])
    assert all(tuple(row) == rouge.METRICS for row in found)
    for (prediction, reference), row in zip(PAIRS, found, strict=True):
        plain = scorer.score(reference, prediction)
        for metric in ("rouge1", "rouge2", "rougeL"):
            assert row[metric] == pytest.approx(100 * plain[metric].fmeasure)
        lines = [re.sub(r"\. ", ".\n", text) for text in (reference, prediction)]
        assert row["rougeLsum"] == pytest.approx(100 * scorer.score(*lines)["rougeLsum"].fmeasure)
    assert found[1]["rougeLsum"] > found[1]["rougeL"]  # the order of sentences does not matter
    assert found[-1] == dict.fromkeys(rouge.METRICS, 100.0)
    for row in found[2:5]:
        assert row == dict.fromkeys(rouge.METRICS, 0.0)


def test_rouge_wants_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        rouge.rouge(["a"], [])


# Intervals ----------------------------------------------------------------------------------------


def test_bootstrap_is_deterministic_and_leaves_the_global_state() -> None:
    values = [i * 1.37 % 1 for i in range(50)]
    state = torch.get_rng_state()
    assert rouge.bootstrap(values) == rouge.bootstrap(values)
    assert rouge.bootstrap(values) != rouge.bootstrap(values, seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    interval = rouge.bootstrap(values, resamples=4000)
    error = statistics.pstdev(values) / math.sqrt(len(values))
    assert interval.mean == pytest.approx(statistics.fmean(values))
    assert interval.low == pytest.approx(interval.mean - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(interval.mean + 1.96 * error, abs=0.1 * error)
    narrow = rouge.bootstrap(values, level=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.6745 * error, rel=0.1)


def test_bootstrap_covers_the_true_mean() -> None:
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(300):
        interval = rouge.bootstrap(torch.rand(60, generator=generator).tolist(), resamples=400)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.90 <= covered / 300 <= 0.985


def test_bootstrap_in_several_draws() -> None:
    values = [float(i % 7) for i in range(30_000)]  # 34 resamples at once
    interval = rouge.bootstrap(values, resamples=100)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(30_000, (100, 30_000), generator=generator) % 7  # in one draw
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    wanted = torch.quantile(drawn.double().mean(dim=1), bounds).tolist()
    assert [interval.low, interval.high] == pytest.approx(wanted)


def test_bootstrap_of_one_and_of_none() -> None:
    assert rouge.bootstrap([3.5]) == rouge.Interval(3.5, 3.5, 3.5)
    with pytest.raises(ValueError, match="no values"):
        rouge.bootstrap([])


# Summaries ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_summaries_equal_plain_generate_one_by_one(model, tokenizer, encoded, options) -> None:
    found = generate.summarize(model, tokenizer, encoded, options)
    assert found == [plain_generate(model, tokenizer, row, options) for row in encoded]
    assert len({summary.text for summary in found}) > 3  # the order is worth something
    assert len({summary.tokens for summary in found}) > 1
    assert found == generate.summarize(model, tokenizer, encoded[::-1], options)[::-1]


def test_model_is_left_as_it_was(model, tokenizer, encoded) -> None:
    model.model.encoder.eval()  # mixed modes
    modes = [module.training for module in model.modules()]
    config = copy.deepcopy(model.generation_config.to_dict())
    state = torch.get_rng_state()
    weights = copy.deepcopy(model.state_dict())
    generate.summarize(model, tokenizer, encoded, BEAMS)
    assert [module.training for module in model.modules()] == modes
    assert True in modes
    assert False in modes
    assert model.generation_config.to_dict() == config
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_mode_is_put_back_after_an_error(model, tokenizer, encoded, monkeypatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate.summarize(model, tokenizer, encoded, BEAMS)
    assert all(module.training for module in model.modules())


def test_settings_go_before_the_checkpoint(model, tokenizer, encoded) -> None:
    short = GenerationOptions(beams=2, min_length=8, max_length=9)
    before = generate.summarize(model, tokenizer, encoded, short)
    # `tokens` counts the start token, which min_length and max_length count as well
    assert all(8 <= summary.tokens <= 9 for summary in before)
    model.generation_config.update(max_new_tokens=30, min_new_tokens=20, num_return_sequences=2)
    model.generation_config.update(return_dict_in_generate=True, no_repeat_ngram_size=1)
    assert generate.summarize(model, tokenizer, encoded, short) == before


def test_no_repeated_ngrams(model, tokenizer, encoded) -> None:
    found = []
    for size in (0, 2):
        options = GenerationOptions(beams=2, min_length=20, max_length=30, no_repeat_ngram=size)
        found.append(generate.summarize(model, tokenizer, encoded, options))
        assert found[-1] == [plain_generate(model, tokenizer, row, options) for row in encoded]
    assert found[0] != found[1]


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_nothing_is_printed(model, tokenizer, encoded, options, capfd, monkeypatch) -> None:
    model.generation_config.update(max_new_tokens=30)
    said: list[str] = []
    # whatever was said once is not said again: forget it, and count the quiet ones too
    transformers_logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.Logger, "warning", lambda _, text, *rest, **__: said.append(text))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate.summarize(model, tokenizer, encoded, options)
    assert said == []
    assert capfd.readouterr() == ("", "")


def test_every_setting_reaches_generate(model, tokenizer, encoded, monkeypatch) -> None:
    given: dict[str, object] = {}
    original = model.generate

    def spy(**arguments: object) -> torch.Tensor:
        given.update(arguments)
        return original(**arguments)

    monkeypatch.setattr(model, "generate", spy)
    options = GenerationOptions(
        beams=2, min_length=4, max_length=9, length_penalty=0.5, no_repeat_ngram=2
    )
    generate.summarize(model, tokenizer, encoded, options)
    expected = {
        "num_beams": 2,
        "min_length": 4,
        "max_length": 9,
        "length_penalty": 0.5,
        "no_repeat_ngram_size": 2,
        "early_stopping": True,
        "do_sample": False,
    }
    assert {name: given[name] for name in expected} == expected


def test_a_checkpoint_with_old_settings_in_its_config(tokenizer, encoded, tmp_path) -> None:
    """bart-large-cnn on the hub keeps its length settings in config.json."""
    model = make_model()
    expected = generate.summarize(model, tokenizer, encoded, BEAMS)
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    path = tmp_path / "config.json"
    old = {"min_length": 14, "max_length": 18, "length_penalty": 2.0, "forced_bos_token_id": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | old | {"num_beams": 4}))
    model = BartForConditionalGeneration.from_pretrained(tmp_path)
    assert generate.summarize(model, tokenizer, encoded, BEAMS) == expected


def test_progress_names_its_title(model, tokenizer, encoded, capfd) -> None:
    generate.summarize(model, tokenizer, encoded, GREEDY, progress="base")
    assert re.search(r"base: 100%.*9/9", capfd.readouterr().err)


def test_autocast_is_the_callers_choice(model, tokenizer, encoded) -> None:
    seen = set()
    model.lm_head.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    generate.summarize(model, tokenizer, encoded[:2], BEAMS, torch.bfloat16)
    assert seen == {torch.bfloat16}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        generate.summarize(model, tokenizer, encoded[:2], BEAMS)
    assert seen == {torch.float32}


def test_no_dialogues_no_summaries(model, tokenizer) -> None:
    assert generate.summarize(model, tokenizer, [], BEAMS) == []


def test_one_dialogue_without_words(model, tokenizer) -> None:
    (summary,) = generate.summarize(model, tokenizer, [Encoded("x", [0, 2], [0, 2])], BEAMS)
    assert summary.tokens >= 3


@pytest.mark.parametrize(
    "options",
    [
        GenerationOptions(min_length=9, max_length=8),
        GenerationOptions(min_length=-1),
        GenerationOptions(max_length=65),
        GenerationOptions(beams=0),
        GenerationOptions(evaluation_batch_size=0),
    ],
)
def test_impossible_settings(model, tokenizer, encoded, options) -> None:
    with pytest.raises(UserError):
        generate.summarize(model, tokenizer, encoded, options)


# Comparison ---------------------------------------------------------------------------------------


def adapted(seed: int = 0) -> BartForConditionalGeneration:
    model = make_model(seed)
    minilora.inject(model, minilora.LoRAConfig(rank=2, alpha=5, targets=("q_proj", "v_proj")))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("merged", [False, True])
def test_evaluate_decodes_the_base_and_the_adapted_model(tokenizer, encoded, merged) -> None:
    model = adapted()
    if merged:
        minilora.merge(model)
    result = generate.evaluate(
        model, tokenizer, examples_for(encoded), encoded, BEAMS, data="chat", split="validation"
    )
    base = generate.summarize(make_model(), tokenizer, encoded, BEAMS)
    finetuned = generate.summarize(model, tokenizer, encoded, BEAMS)
    assert [e.base for e in result.examples] == [summary.text for summary in base]
    assert [e.finetuned for e in result.examples] == [summary.text for summary in finetuned]
    assert base != finetuned
    assert (result.data, result.split, result.n) == ("chat", "validation", 9)
    assert result.generation["beams"] == 3
    assert result.intervals["base"]["gen_len"].mean == statistics.fmean(
        summary.tokens for summary in base
    )
    layers = [m for m in model.modules() if isinstance(m, minilora.LoRALinear)]
    assert all(layer.merged is merged for layer in layers)


def test_evaluate_against_another_base_model(model, tokenizer, encoded) -> None:
    other = make_model(seed=1)
    examples = examples_for(encoded)
    result = generate.evaluate(model, tokenizer, examples, encoded, BEAMS, base_model=other)
    base = generate.summarize(other, tokenizer, encoded, BEAMS)
    assert [e.base for e in result.examples] == [summary.text for summary in base]


def test_evaluate_wants_the_encoding_of_the_examples(model, tokenizer, encoded) -> None:
    with pytest.raises(ValueError, match="in their order"):
        generate.evaluate(model, tokenizer, examples_for(encoded)[::-1], encoded, BEAMS)


@pytest.fixture
def comparison() -> compare.Evaluation:
    return compare.compare(
        BASE, TUNED, EXAMPLES, data="minichat", split="test", generation={"beams": 4}
    )


def test_json_has_the_fixed_shape(comparison, tmp_path) -> None:
    path = tmp_path / "evaluation.json"
    files.write_json(path, comparison.to_dict())
    data = json.loads(path.read_text("utf-8"))
    assert list(data) == [
        "data", "split", "n", "base", "finetuned", "reference", "rouge_tokenizer",
        "intervals", "generation", "examples",
    ]  # fmt: skip
    assert (data["data"], data["split"], data["n"]) == ("minichat", "test", 3)
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum", "gen_len"]
    shares = ["foreign_names", "foreign_numbers", "non_words", "repeats"]
    assert list(data["reference"]) == shares
    for side in ("base", "finetuned"):
        assert list(data[side]) == [*names, *shares]
        for name, (low, high) in data["intervals"][side].items():
            assert low <= data[side][name] <= high
    assert list(data["intervals"]) == ["base", "finetuned", "difference", "reference"]
    assert list(data["intervals"]["difference"]) == names
    for name, (mean, low, high) in data["intervals"]["difference"].items():
        assert low <= mean <= high
        assert mean == pytest.approx(data["finetuned"][name] - data["base"][name])
    assert data["generation"] == {"beams": 4}
    assert data["examples"][0] == {
        "id": "a",
        "dialogue": "Ann: cake?\nBob: yes",
        "reference": "Bob wants cake.",
        "base": "Bob wants cake.",
        "finetuned": "Bob wants tea.",
        "rouge1_base": 100.0,
        "rouge1_finetuned": pytest.approx(200 / 3),
    }
    assert [e["id"] for e in data["examples"]] == ["a", "b", "c"]
    assert data["base"]["gen_len"] == pytest.approx(14 / 3)


def test_intervals_are_paired() -> None:
    """Dialogues differ widely, the two models by a constant: its interval has no width."""
    words = [f"word{i}" for i in range(12)]
    examples = [Example(str(i), "x", " ".join(words)) for i in range(8)]
    base = [compare.Summary(" ".join(words[: i + 2]), i) for i in range(8)]
    tuned = [compare.Summary(summary.text, summary.tokens + 1) for summary in base]
    intervals = compare.compare(base, tuned, examples).intervals
    assert intervals["difference"]["gen_len"] == rouge.Interval(1.0, 1.0, 1.0)
    assert intervals["difference"]["rouge1"] == rouge.Interval(0.0, 0.0, 0.0)
    assert intervals["base"]["rouge1"].high - intervals["base"]["rouge1"].low > 5


def test_one_dialogue_and_none() -> None:
    one = compare.compare(BASE[:1], TUNED[:1], EXAMPLES[:1])
    assert one.intervals["base"]["rouge1"] == rouge.Interval(100.0, 100.0, 100.0)
    with pytest.raises(UserError, match="nothing to evaluate"):
        compare.compare([], [], [])
    with pytest.raises(ValueError, match="zip"):
        compare.compare(BASE[:1], TUNED, EXAMPLES)


# Files --------------------------------------------------------------------------------------------


def test_json_survives_any_text(tmp_path) -> None:
    path = tmp_path / "e.json"
    data = {"text": "é 安 😂 \ud83d \x00 \u2028"}
    files.write_json(path, data)
    assert json.loads(path.read_bytes().decode("utf-8")) == data
    assert "安 😂" in path.read_text("utf-8")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, call) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "e.json"
    files.write_json(path, {"old": 1})
    with monkeypatch.context() as patch:
        # Python 3.10 keeps an os.replace of its own.
        patch.setattr(*((Path, call) if call == "replace" else (os, call)), fail)
        with pytest.raises(OSError, match="No space"):
            files.write_json(path, {"new": 2})
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(path, {"new": float("nan")})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["e.json"]
