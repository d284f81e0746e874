"""Rows and files of dialogues, a tiny BART with its tokenizer, and runs, for tests of the task."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from minilora.summarization.data import splits
from minilora.summarization.data.reading import Example
from minilora.summarization.evaluation.compare import Summary
from minilora.summarization.settings import DataOptions

GOOD = {"id": "a-1", "dialogue": "Ann: hi\nBob: hello", "summary": "They greet."}
OTHER = {"id": "a-2", "dialogue": "Cy: bye", "summary": "Cy leaves."}
EXPECTED = [Example(**GOOD), Example(**OTHER)]


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    numbers = range(start, start + count)
    return [{"id": f"r{i}", "dialogue": f"A: {i}", "summary": f"Number {i}."} for i in numbers]


def as_json(rows: Any) -> bytes:
    return json.dumps(rows).encode()


def as_jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: list[dict[str, str]], quoting: int = csv.QUOTE_MINIMAL) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), quoting=quoting)  # type: ignore[arg-type]
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def load(path: Path | str, *names: str, **settings: Any) -> tuple[dict[str, list[Example]], str]:
    found, notices = splits.load(
        DataOptions(data=str(path), **settings), names or ("train", "validation", "test")
    )
    return found, "\n".join(notices)


# An evaluation -----------------------------------------------------------------------------------

EXAMPLES = [
    Example("a", "Ann: cake?\nBob: yes", "Bob wants cake."),
    Example("b", "Ann: hi 😂", "Ann greets."),
    Example("c", "安娜: 你好", "安娜问好。"),
]
BASE = [Summary("Bob wants cake.", 7), Summary("", 3), Summary("安娜", 4)]
TUNED = [Summary("Bob wants tea.", 7), Summary("Ann greets.", 5), Summary("问好", 4)]


# A model -----------------------------------------------------------------------------------------

SPECIAL = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}


def byte_level_bpe(vocabulary: int = 400) -> PreTrainedTokenizerFast:
    """A tokenizer in BART's format, of at most so many tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = "Ann: hello there, shall we meet?\nBob: Summarize the following conversation. Summary:"
    tokenizer.train_from_iterator([text] * 10, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {f"{name}_token": token for name, token in SPECIAL.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def small_bart(seed: int = 0, **changes: Any) -> BartForConditionalGeneration:
    """As random as they come, but with weights large enough for summaries to differ."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 400, "d_model": 16, "max_position_embeddings": 64, "init_std": 0.3}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 24}
    return BartForConditionalGeneration(BartConfig(**(sizes | changes))).eval()


def save_bart(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A directory as `save_pretrained` writes it, with its tokenizer."""
    small_bart(seed, **changes).save_pretrained(directory)
    byte_level_bpe().save_pretrained(directory)
    return directory


# Runs --------------------------------------------------------------------------------------------

NAMES = ("Ann", "Bob", "Cy", "Dee", "Eve", "Fay")
PLACES = ("the park", "a bar", "school", "the sea", "work")


def dialogues(count: int, start: int = 0) -> list[dict[str, str]]:
    """Short ones, of unlike length, with something to learn."""
    found = []
    for i in range(start, start + count):
        one, two, place = NAMES[i % 6], NAMES[(i // 6 + i + 1) % 6], PLACES[i % 5]
        more = f"\n{one}: see you then!" * (i % 3)
        text = f"{one}: shall we meet at {place}?\n{two}: ok{more}"
        found.append({"id": f"d{i}", "dialogue": text, "summary": f"{one} meets {two} at {place}."})
    return found


def save_data(directory: Path, train: int = 20, validation: int = 3, test: int = 4) -> Path:
    write(directory / "train.jsonl", as_jsonl(dialogues(train)))
    write(directory / "validation.jsonl", as_jsonl(dialogues(validation, 100)))
    write(directory / "test.jsonl", as_jsonl(dialogues(test, 200)))
    return directory


SMALL = [  # flags of a run that takes a second
    *("--batch-size", "3", "--accumulate", "2", "--epochs", "2", "--learning-rate", "0.02"),
    *("--targets", "q_proj", "v_proj", "--dropout", "0.1"),
    *("--precision", "fp32", "--device", "cpu"),
    *("--beams", "1", "--min-length", "0", "--max-length", "12"),
]


def records(run: Path) -> list[dict[str, Any]]:
    """log.jsonl without what a clock or the machine decides."""
    apart = ("seconds", "tokens_per_second", "peak_bytes")
    lines = (run / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in apart} for line in lines]
