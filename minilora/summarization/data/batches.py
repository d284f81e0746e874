"""From examples to padded batches: tokens, batches of similar length."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..settings import DataOptions
from .reading import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Side = Literal["source", "target"]
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
    limits: tuple[int, int] = field(default=(0, 0), compare=False)

    def __str__(self) -> str:
        sides = (
            (self.sources, "dialogues cut to --max-source-length", self.limits[0]),
            (self.targets, "summaries cut to --max-target-length", self.limits[1]),
        )
        return ", ".join(
            f"{count:,} of {self.total:,} {what} or the model's positions ({limit} tokens)"
            for count, what, limit in sides
            if count
        )


# Tokenizing ---------------------------------------------------------------------------------------


def prompt(options: DataOptions) -> tuple[str, str]:
    r"""The texts before and after every dialogue. `\n` in these flags is a line break."""
    return options.prompt_before.replace("\\n", "\n"), options.prompt_after.replace("\\n", "\n")


def encode(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", options: DataOptions
) -> tuple[list[Encoded], Truncation]:
    """Token ids of prompts and summaries, in the order of `examples`, cut to the length limits.

    A long dialogue loses its end; the prompt after it and `</s>` stay.

    Raises:
        UserError: prompt and special tokens alone exceed a limit.
    """
    dialogues = [example.dialogue for example in examples]
    summaries = [example.summary for example in examples]
    sources, long_sources = _limited(
        tokenizer, "source", dialogues, options.max_source_length, prompt(options)
    )
    targets, long_targets = _limited(tokenizer, "target", summaries, options.max_target_length)
    encoded = [
        Encoded(example.id, source, target)
        for example, source, target in zip(examples, sources, targets, strict=True)
    ]
    limits = options.max_source_length, options.max_target_length
    return encoded, Truncation(long_sources, long_targets, len(encoded), limits)


def _limited(
    tokenizer: "PreTrainedTokenizerBase",
    side: Side,
    texts: Sequence[str],
    limit: int,
    around: tuple[str, str] = ("", ""),
) -> tuple[list[list[int]], int]:
    """Token ids of the texts inside the prompt, at most `limit` each, and how many were cut."""
    before, after = around
    _, ending = frame(tokenizer, side, after)
    added = [] if ending or side == "source" else [end_token(tokenizer)]

    def tokenize(texts: Sequence[str]) -> list[list[int]]:
        return [row + added for row in _tokenize(tokenizer, side, texts)["input_ids"]]

    if (used := len(tokenize([before + after])[0])) >= limit:
        parts, shorter = ("prompt and ", " or shorten the prompt") if before + after else ("", "")
        raise UserError(
            f"--max-{side}-length {limit} (or the model's positions): {parts}special tokens alone "
            f"take {used}: raise it{shorter}"
        )
    rows, cut = list[list[int]](), 0
    for start in range(0, len(texts), 512):  # not all at once: the tokenizer keeps 120 B a token
        chunk = [before + text + after for text in texts[start : start + 512]]
        for row in tokenize(chunk):
            cut += len(row) > limit
            end = ending + added
            rows.append(row if len(row) <= limit else row[: limit - len(end)] + end)
    return rows, cut


def frame(
    tokenizer: "PreTrainedTokenizerBase", side: Side = "target", after: str = ""
) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before a text; `after` with those it puts at the end."""
    probe = _tokenize(tokenizer, side, ["x"], return_special_tokens_mask=True)
    first = probe["special_tokens_mask"][0].index(0)
    ending: list[int] = _tokenize(tokenizer, side, [after])["input_ids"][0][first:]
    return probe["input_ids"][0][:first], ending


def end_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that ends a summary, also if the tokenizer itself does not add it.

    Raises:
        UserError: the tokenizer has no such token.
    """
    _, ending = frame(tokenizer)
    end = ending[0] if ending else tokenizer.eos_token_id
    if isinstance(end, int):
        return end
    raise UserError("its tokenizer has no eos_token to end a summary with: set it in its config")


def _tokenize(
    tokenizer: "PreTrainedTokenizerBase", side: Side, texts: Sequence[str], **more: bool
) -> Any:
    arguments: dict[str, Any] = {"text" if side == "source" else "text_target": list(texts)}
    # "</s>" in a dialogue is text: without split_special_tokens it would become the end token.
    return tokenizer(**arguments, **more, split_special_tokens=True, verbose=False)


# Batching -----------------------------------------------------------------------------------------


def batches(
    lengths: Sequence[tuple[int, int]], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """Batches of indexes into `lengths` for one epoch: random, of similar length within a batch.

    `lengths` are (source, target) in tokens. Shuffled examples are sorted in chunks of 100 batches,
    by target among sources that differ by less than 8, cut, and the batches shuffled: there is
    little padding on either side. The result depends on the arguments only, so the position is all
    that a run needs to resume within an epoch.
    """
    generator = random.Random(f"{seed} {epoch}")  # the global state stays as it is
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
    """Batches of indexes, longest source first: too little memory shows in the first batch."""
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index].source))
    return _slices(order, batch_size)


def _slices(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def collate(batch: Sequence[Encoded], pad_token_id: int) -> dict[str, Tensor]:
    """Pad b examples to the longest source, s tokens, and the longest target, t tokens.

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
