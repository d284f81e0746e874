"""What pocket-bart reads: examples of each task, in batches, by a curriculum of lengths.

A small model learns to read its source only if it begins with short, easy sequences; `docs/log.md`
has the measurements. Progress is counted in tokens read and written (source + target).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from names import GENDERS, SLOTS, invent
from noise import infill, mask_tokens, permute_sentences
from prepare import FIRST
from tokenizers import Tokenizer
from torch import Tensor

BOS, PAD, EOS = 0, 1, 2
Example = tuple[np.ndarray, np.ndarray]  # source and target, without <s> and </s>
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """Until `until` million tokens: tasks by their share of the tokens, and the longest texts."""

    until: float
    tasks: dict[str, float]
    segment: int  # longest segment to denoise
    source: int  # longest dialogue to summarize


STAGES = [
    Stage(0.9, {"mask": 1.0}, 24, 0),
    Stage(1.4, {"mask": 0.7, "infill": 0.3}, 48, 0),
    Stage(2.2, {"infill": 0.6, "pseudo": 0.4}, 64, 110),
    Stage(5.0, {"infill": 0.35, "pseudo": 0.45, "pairs": 0.20}, 100, 180),
    Stage(11.1, {"infill": 0.25, "pseudo": 0.50, "pairs": 0.25}, 140, 320),
    Stage(18.8, {"infill": 0.15, "pseudo": 0.50, "pairs": 0.35}, 140, 320),
    Stage(math.inf, {"infill": 0.40, "pseudo": 0.42, "pairs": 0.18}, 140, 320),
]


@dataclass
class Texts:
    """One split's packed arrays."""

    columns: dict[str, np.ndarray]

    @classmethod
    def load(cls, path: Path) -> "Texts":
        with np.load(path) as arrays:
            return cls(dict(arrays))

    def __len__(self) -> int:
        return len(self.columns["text_offsets"]) - 1

    def get(self, column: str, place: int) -> np.ndarray:
        start, end = self.columns[f"{column}_offsets"][place : place + 2]
        return self.columns[f"{column}_tokens"][start:end].astype(np.int64)

    def stretch(self, start: int, length: int) -> np.ndarray:
        return self.columns["text_tokens"][start : start + length].astype(np.int64)


class Names:
    """Fill slots with names, the same one for every mention in an example."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        pool = json.loads(path.read_text())
        rng = np.random.default_rng(0)
        for gender in GENDERS:  # four in ten names are invented
            pool[gender] += invent(gender, 2 * len(pool[gender]) // 3, rng)
        self.encoded = {
            gender: [
                (tokenizer.encode(name, add_special_tokens=False).ids,
                 tokenizer.encode(" " + name, add_special_tokens=False).ids)
                for name in pool[gender]
            ]
            for gender in GENDERS
        }  # fmt: skip

    def draw(self, rng: np.random.Generator) -> dict[int, list[int]]:
        """Tokens of every slot number, drawn without repeating a name within a gender."""
        table: dict[int, list[int]] = {}
        for index, gender in enumerate(GENDERS):
            names = self.encoded[gender]
            for person, choice in enumerate(rng.choice(len(names), SLOTS, replace=False)):
                number = FIRST + 2 * (index * SLOTS + person)
                table[number], table[number + 1] = names[choice]
        return table

    @staticmethod
    def fill(tokens: np.ndarray, table: dict[int, list[int]]) -> np.ndarray:
        if not (tokens >= FIRST).any():
            return tokens
        out: list[int] = []
        for token in tokens.tolist():
            out.extend(table[token]) if token >= FIRST else out.append(token)
        return np.array(out, dtype=np.int64)


@dataclass
class Source:
    """Draws examples of each task from one split."""

    texts: dict[str, Texts]
    names: Names
    mask: int
    newline: int
    ends: frozenset[int]

    @classmethod
    def load(cls, data: Path, split: str, tokenizer: Tokenizer) -> "Source":
        texts = {
            name: Texts.load(data / f"{split}-{name}.npz")
            for name in ("prose", "chat", "pseudo", "pairs")
        }
        mask, newline = (tokenizer.token_to_id(token) for token in ("<mask>", "Ċ"))
        if mask is None or newline is None:
            raise ValueError("the tokenizer lacks <mask> or the newline")
        ends = {tokenizer.token_to_id(end) for end in (".", "?", "!", '."', '?"', '!"', "Ċ")}
        return cls(
            texts, Names(data / "names.json", tokenizer), mask, newline,
            frozenset(end for end in ends if end is not None),
        )  # fmt: skip

    def segment(self, longest: int, rng: np.random.Generator) -> np.ndarray:
        """A stretch of a chat (whole turns) or of prose."""
        if rng.random() < 0.3:
            prose = self.texts["prose"]
            size = len(prose.columns["text_tokens"])
            return prose.stretch(int(rng.integers(size - longest)), longest)
        chat = self.texts["chat"]
        tokens = chat.get("text", int(rng.integers(len(chat))))
        tokens = self.names.fill(tokens, self.names.draw(rng))
        if len(tokens) > longest:
            starts = np.flatnonzero(tokens[: len(tokens) - longest] == self.newline) + 1
            start = int(rng.choice(np.concatenate([[0], starts])))
            tokens = tokens[start : start + longest]
        return tokens

    def example(self, task: str, stage: Stage, rng: np.random.Generator) -> Example:
        if task == "mask":
            target = self.segment(stage.segment, rng)
            return mask_tokens(target, 0.15, self.mask, rng), target
        if task == "infill":
            longest = int(stage.segment * (0.4 + 0.6 * rng.random()))
            target = self.segment(longest, rng)
            source = target
            if rng.random() < 0.25:
                source = permute_sentences(source, self.ends, rng)
            return infill(source, 0.25, self.mask, rng), target
        texts = self.texts[task]
        while True:
            place = int(rng.integers(len(texts)))
            table = self.names.draw(rng)
            source = self.names.fill(texts.get("text", place), table)
            target = self.names.fill(texts.get("summary", place), table)
            if len(source) <= stage.source and len(target) <= 80:
                return source, target

    def batches(
        self, stage: Stage, budget: int, rng: np.random.Generator, rounds: int = 12
    ) -> list[tuple[str, Batch]]:
        """About `rounds` batches of like length, tasks in the stage's shares, shuffled."""
        found: list[tuple[str, Batch]] = []
        for task, share in stage.tasks.items():
            wanted = rng.poisson(share * rounds)
            examples: list[Example] = []
            total = 0
            while total < wanted * budget:
                example = self.example(task, stage, rng)
                examples.append(example)
                total += len(example[0]) + len(example[1]) + 4
            found += [(task, collate(part)) for part in chunks(examples, budget)]
        return [found[place] for place in rng.permutation(len(found))]


def chunks(examples: list[Example], budget: int) -> list[list[Example]]:
    """Sort by length and cut into parts of at most `budget` padded positions."""
    examples = sorted(examples, key=lambda pair: (len(pair[0]), len(pair[1])))
    parts: list[list[Example]] = [[]]
    source = target = 0
    for pair in examples:
        source, target = max(source, len(pair[0]) + 2), max(target, len(pair[1]) + 2)
        if parts[-1] and (source + target) * (len(parts[-1]) + 1) > budget:
            parts.append([])
            source, target = len(pair[0]) + 2, len(pair[1]) + 2
        parts[-1].append(pair)
    return [part for part in parts if part]


def collate(examples: list[Example]) -> Batch:
    """`<s> ... </s>` on both sides, padded; the decoder reads `</s> <s> ...` as BART does."""
    sources = [[BOS, *source.tolist(), EOS] for source, _ in examples]
    targets = [[BOS, *target.tolist(), EOS] for _, target in examples]

    def pad(rows: list[list[int]]) -> torch.Tensor:
        width = max(map(len, rows))
        return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])

    labels = pad(targets)
    start = torch.full((len(rows := labels), 1), EOS)
    source = pad(sources)
    return {
        "input_ids": source,
        "attention_mask": (source != PAD).long(),
        "decoder_input_ids": torch.cat([start, rows[:, :-1]], 1),
        "labels": labels,
    }
