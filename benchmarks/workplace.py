"""The input of all contestants of a benchmark: one model, one start, the same token ids.

    FOLDER/model/      config, weights (safetensors) and tokenizer
    FOLDER/adapter/    the start of every adapter, in PEFT's format: A Kaiming, B zero
    FOLDER/decoder/    the same of those that are in the decoder only
    FOLDER/data/       the dialogues as train.jsonl and validation.jsonl, for minilora's reader
    FOLDER/rows.json   the same as token ids, for the others

The folder is temporary. SAMSum's licence (CC BY-NC-ND) does not allow derived texts: a result
contains no text of SAMSum and no summary of its dialogues.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import ROOT
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartTokenizer,
    PreTrainedTokenizerBase,
)

import minilora
from minilora import LoRAConfig
from minilora.summarization.data.batches import Encoded, encode
from minilora.summarization.data.reading import Example
from minilora.summarization.data.splits import load
from minilora.summarization.model.loading import load_model, load_tokenizer
from minilora.summarization.settings import DataOptions

SHARED = ROOT.parent / "shared" / "data"
SAMSUM, BART_TOKENIZER = SHARED / "samsum", SHARED / "bart-tokenizer"
SPECIAL = {"<s>", "<pad>", "</s>", "<unk>", "<mask>"}
TARGETS = ("q_proj", "v_proj")
DECODER = r"(.*\.)?decoder\..*\.(q_proj|v_proj)"
MAX_SOURCE, MAX_TARGET = 1024, 128


def _bart(width: int, layers: int, heads: int, feed_forward: int, positions: int = 1024) -> Any:
    return {
        "d_model": width,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": feed_forward,
        "decoder_ffn_dim": feed_forward,
        "max_position_embeddings": positions,
    }


# The dimensions of facebook/bart-base and bart-large (Lewis et al. 2020), and a tiny one.
DIMENSIONS = {
    "base": _bart(768, 6, 12, 3072),
    "large": _bart(1024, 12, 16, 4096),
    "tiny": _bart(64, 2, 4, 128),
}


def require_samsum() -> None:
    """End with one line and without an error if there is no SAMSum."""
    for path in (SAMSUM, BART_TOKENIZER):
        if not path.is_dir():
            print(f"skipped: there is no {path} (SAMSum and BART's tokenizer)")
            sys.exit(0)


def bart_tokenizer() -> PreTrainedTokenizerBase:
    """facebook/bart-*'s byte-level BPE, made of its vocabulary and merges."""
    vocabulary = json.loads((BART_TOKENIZER / "vocab.json").read_text(encoding="utf-8"))
    text = (BART_TOKENIZER / "merges.txt").read_text(encoding="utf-8")
    merges = [line for line in text.splitlines() if line and not line.startswith("#version")]
    return BartTokenizer(
        vocab=vocabulary, merges=[tuple(line.split(" ")) for line in merges], model_max_length=1024
    )


def random_bart(size: str, vocabulary: int, seed: int, std: float = 0.02) -> Any:
    """A BART of real dimensions with random weights; its speed does not depend on them."""
    torch.manual_seed(seed)
    config = BartConfig(vocab_size=vocabulary, init_std=std, **DIMENSIONS[size])
    return BartForConditionalGeneration(config)


def samsum(split: str) -> list[Example]:
    """All rows with a dialogue, read by minilora, which normalizes line ends."""
    data, _ = load(DataOptions(data=str(SAMSUM)), (split,))
    return [example for example in data[split] if example.dialogue.strip()]


def spread(
    examples: Sequence[Example], lengths: Sequence[int], count: int, shift: float = 0.5
) -> list[Example]:
    """`count` of them, stratified by length: every n-th in the order of their lengths.

    Another shift within [0, 1) chooses others, as long as there are enough of them.
    """
    if count <= 0 or count >= len(examples):
        return list(examples)
    order = sorted(range(len(examples)), key=lambda i: (lengths[i], i))
    step = len(order) / count
    chosen = sorted(order[int(step * (i + shift))] for i in range(count))
    return [examples[i] for i in chosen]


def write_adapter_start(
    model: Any, folder: Path, targets: Any, rank: int, dropout: float, seed: int
) -> int:
    """Inject, write the start of the adapter, remove it. Returns the trainable parameters."""
    torch.manual_seed(seed)
    config = LoRAConfig(
        rank=rank, alpha=4.0 * rank, dropout=dropout, targets=targets, task_type="SEQ_2_SEQ_LM"
    )
    report = minilora.inject(model, config)
    minilora.save_adapter(model, folder)
    minilora.unload(model)
    return report.trainable


def furnish(
    folder: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    splits: dict[str, list[Example]],
    options: DataOptions,
    *,
    rank: int,
    dropout: float,
    seed: int,
) -> dict[str, Any]:
    """Write the folder. Returns its sizes."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data").mkdir(parents=True)
    rows: dict[str, list[Any]] = {}
    for split, examples in splits.items():
        lines = [json.dumps(asdict(example)) + "\n" for example in examples]
        (folder / "data" / f"{split}.jsonl").write_text("".join(lines))
        rows[split] = [asdict(row) for row in encode(examples, tokenizer, options)[0]]
    (folder / "rows.json").write_text(json.dumps(rows))
    start = (rank, dropout, seed)
    trainable = write_adapter_start(model, folder / "adapter", TARGETS, *start)
    return {
        "trainable": trainable,
        "trainable_decoder": write_adapter_start(model, folder / "decoder", DECODER, *start),
        "examples": {split: len(examples) for split, examples in splits.items()},
        "source_tokens": {s: sum(len(row["source"]) for row in rows[s]) for s in rows},
        "target_tokens": {s: sum(len(row["target"]) for row in rows[s]) for s in rows},
    }


def read_rows(folder: Path) -> dict[str, list[Encoded]]:
    rows = json.loads((folder / "rows.json").read_text())
    return {split: [Encoded(**row) for row in rows[split]] for split in rows}


def samsum_workplace(
    folder: Path,
    size: str,
    train: int,
    validation: int,
    rank: int,
    dropout: float,
    seed: int,
    shift: float = 0.5,
) -> dict[str, Any]:
    """A BART of random weights, its real tokenizer, and a sample of SAMSum by lengths.

    Args:
        shift: chooses the training dialogues; see `spread`.
    """
    tokenizer = bart_tokenizer()
    options = DataOptions(max_source_length=MAX_SOURCE, max_target_length=MAX_TARGET)
    splits = {}
    for split, count, where in (("train", train, shift), ("validation", validation, 0.5)):
        examples = samsum(split)
        splits[split] = spread(examples, [len(e.dialogue) for e in examples], count, where)
    model = random_bart(size, len(tokenizer), seed)
    return furnish(folder, model, tokenizer, splits, options, rank=rank, dropout=dropout, seed=seed)


def pocket_workplace(
    folder: Path, train: int, validation: int, rank: int, dropout: float, seed: int
) -> dict[str, Any]:
    """pocket-bart and the default data, as they ship."""
    options = DataOptions(max_source_length=512, max_target_length=MAX_TARGET)
    data, _ = load(options, ("train", "validation"))
    model = load_model("pocket-bart", torch.device("cpu"))
    tokenizer = load_tokenizer("pocket-bart")
    splits = {"train": data["train"][:train], "validation": data["validation"][:validation]}
    return furnish(folder, model, tokenizer, splits, options, rank=rank, dropout=dropout, seed=seed)
