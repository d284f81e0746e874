"""From examples to padded batches: splits, tokens, batches of like length."""

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from minilora.summarization.presets import DataOptions, UserError
from minilora.summarization.reading import Example, find, read_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "validation", "test")
HELD_OUT = 0.05  # share of the rows that becomes a split the data does not bring
IGNORED = -100  # label of padding; cross-entropy leaves it out


@dataclass(frozen=True)
class Encoded:
    """An `Example` as token ids, special tokens (`<s>` ... `</s>` for BART) included."""

    id: str
    source: list[int]
    target: list[int]


@dataclass(frozen=True)
class Truncation:
    """How many of `total` examples were cut to the length limits."""

    sources: int
    targets: int
    total: int

    def __str__(self) -> str:
        return (
            f"{self.sources:,} of {self.total:,} dialogues cut to --max-source-length, "
            f"{self.targets:,} summaries to --max-target-length"
        )


# Splits -------------------------------------------------------------------------------------------


def load(
    options: DataOptions, splits: Sequence[str] = SPLITS
) -> tuple[dict[str, list[Example]], list[str]]:
    """Reads the splits asked for from `options.data`: a directory, a file or a hub name.

    A split that the data does not bring is held out of train, or validation stands in for test.
    Returns the splits and notices for the user; raises UserError with one line.
    """
    if unknown := [split for split in splits if split not in SPLITS]:
        raise UserError(f"no split is called {unknown[0]!r}; there are {', '.join(SPLITS)}")
    sources, notices = find(options.data), list[str]()
    absent = [split for split in SPLITS[1:] if split not in sources]
    if absent == ["test"]:
        absent, sources["test"] = [], sources["validation"]
        if "test" in splits:
            name = sources["test"].name
            notices.append(f"no test data: {name} stands in, which also chooses the best epoch")

    def read(split: str) -> list[Example]:
        examples, said = read_source(sources[split], options, training=split == "train")
        notices.extend(said)
        return examples

    data: dict[str, list[Example]] = {}
    if absent and "train" in sources and {"train", *absent}.intersection(splits):
        data = _hold_out(read("train"), absent, sources["train"].name, notices)
    for split in splits:
        if split in data:
            continue
        if split not in sources:
            found = ", ".join(source.name for source in sources.values())
            raise UserError(f"{options.data}: no {split} data; found: {found}")
        data[split] = read(split)
    return {split: data[split] for split in splits}, list(dict.fromkeys(notices))


def _hold_out(
    examples: list[Example], splits: Sequence[str], name: str, notices: list[str]
) -> dict[str, list[Example]]:
    """Chosen by a hash of the dialogue: rows added later move no other, twins stay together."""
    digests = [hashlib.sha256(example.dialogue.encode()).digest() for example in examples]
    order = sorted(range(len(examples)), key=digests.__getitem__)
    parts, start = dict[str, list[Example]](), 0
    for number, split in enumerate(splits, 1):
        limit = int(HELD_OUT * number * 2**64).to_bytes(8, "big")
        end = max(start + 1, sum(digest < limit for digest in digests))  # at least one row
        parts[split], start = [examples[i] for i in sorted(order[start:end])], end
    parts["train"] = [examples[i] for i in sorted(order[start:])]
    if not all(parts.values()):
        raise UserError(f"{name}: too few rows to hold out {' and '.join(splits)} data")
    counts = ", ".join(f"{len(parts[split]):,} {split}" for split in ("train", *splits))
    notices.append(f"no {' and '.join(splits)} data: held out of {name} ({counts})")
    return parts


def fingerprint(examples: Iterable[Example]) -> str:
    """SHA-256 over ids, dialogues and summaries in their order, in hexadecimal."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.dialogue, example.summary]).encode())
    return digest.hexdigest()


# Tokenizing ---------------------------------------------------------------------------------------


def build_prompt(dialogue: str, options: DataOptions) -> str:
    r"""The text the model reads; a written-out `\n` in the prompt's flags is a line break."""
    before, after = _prompt(options)
    return before + dialogue + after


def _prompt(options: DataOptions) -> tuple[str, str]:
    return options.prompt_before.replace("\\n", "\n"), options.prompt_after.replace("\\n", "\n")


def encode(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", options: DataOptions
) -> tuple[list[Encoded], Truncation]:
    """Token ids of prompts and summaries, in the order of `examples`, cut to the length limits.

    Of a long source the end of the dialogue goes; the prompt after it and `</s>` stay. Raises
    UserError if a limit leaves no room beside prompt and special tokens.
    """
    dialogues = [example.dialogue for example in examples]
    summaries = [example.summary for example in examples]
    sources, long_sources = _limited(
        tokenizer, "source", dialogues, options.max_source_length, _prompt(options)
    )
    targets, long_targets = _limited(tokenizer, "target", summaries, options.max_target_length)
    encoded = [
        Encoded(example.id, source, target)
        for example, source, target in zip(examples, sources, targets, strict=True)
    ]
    return encoded, Truncation(long_sources, long_targets, len(encoded))


def _limited(
    tokenizer: "PreTrainedTokenizerBase",
    side: Literal["source", "target"],
    texts: Sequence[str],
    limit: int,
    prompt: tuple[str, str] = ("", ""),
) -> tuple[list[list[int]], int]:
    """Token ids of the texts inside the prompt, at most `limit` each, and how many were cut."""
    before, after = prompt

    def tokenize(texts: Sequence[str], **more: bool) -> Any:
        arguments: dict[str, Any] = {"text" if side == "source" else "text_target": list(texts)}
        # A dialogue that says "</s>" says four characters: without split_special_tokens it ends.
        return tokenizer(**arguments, **more, split_special_tokens=True, verbose=False)

    opening = tokenize(["x"], return_special_tokens_mask=True)["special_tokens_mask"][0].index(0)
    ending = tokenize([after])["input_ids"][0][opening:]  # the prompt's end, then </s>
    if (used := len(tokenize([before + after])["input_ids"][0])) >= limit:
        raise UserError(f"--max-{side}-length {limit}: prompt and special tokens alone take {used}")
    rows, cut = list[list[int]](), 0
    for start in range(0, len(texts), 512):  # not all at once: the tokenizer keeps 120 B a token
        chunk = [before + text + after for text in texts[start : start + 512]]
        for row in tokenize(chunk)["input_ids"]:
            cut += len(row) > limit
            rows.append(row if len(row) <= limit else row[: limit - len(ending)] + ending)
    return rows, cut


# Batching -----------------------------------------------------------------------------------------


def batches(
    lengths: Sequence[tuple[int, int]], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """Batches of indexes into `lengths` for one epoch: random, but of like length within a batch.

    `lengths` are (source, target) in tokens. Shuffled examples are sorted in chunks of 100 batches,
    by target among sources that differ by less than 8, cut, and the batches shuffled: little
    padding on either side, and as good as random to the model.
    A pure function of its arguments: to go on in mid-epoch takes nothing but the position.
    """
    generator = random.Random(f"{seed} {epoch}")  # of its own: the global state stays as it is
    order = list(range(len(lengths)))
    generator.shuffle(order)
    found: list[list[int]] = []
    for start in range(0, len(order), 100 * batch_size):
        chunk = order[start : start + 100 * batch_size]
        chunk.sort(key=lambda i: (lengths[i][0] // 8, lengths[i][1]))
        found += _slices(chunk, batch_size)
    generator.shuffle(found)
    return found


def by_length(encoded: Sequence[Encoded], batch_size: int) -> list[list[int]]:
    """Batches of indexes, longest source first: if memory does not suffice, it shows at once."""
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index].source))
    return _slices(order, batch_size)


def _slices(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def collate(batch: Sequence[Encoded], pad_token_id: int) -> dict[str, Tensor]:
    """Pads b examples to the longest source, s tokens, and the longest target, t tokens.

    The mask and the -100 follow from the lengths, not from the ids: a text may hold the pad token.
    """
    return {
        "input_ids": _pad([row.source for row in batch], pad_token_id),  # (b, s)
        "attention_mask": _pad([[1] * len(row.source) for row in batch], 0),  # (b, s), 1 on tokens
        "labels": _pad([row.target for row in batch], IGNORED),  # (b, t)
    }


def _pad(rows: Sequence[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    padded = [row + [value] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.long)  # (b, width)
