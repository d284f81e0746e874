"""What pocket-bart reads: examples of each task, in batches of like length, by stages.

A small model learns to read its source only if it begins with short, easy sequences; `docs/log.md`
has the measurements. The source of a summary begins with a line that names its manner (`One
line:`), except for narratives and for three in ten service chats. So an everyday chat without such
a line is retold in two to four sentences.
"""

import json
import lzma
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from names import FEMALE, GENDERS, MALE, SLOT_CHARACTER, SLOTS, blend, invent, slot
from noise import infill, mask_tokens, permute_sentences
from pseudo import Turn, show, summarize
from tokenizers import Tokenizer
from torch import Tensor
from vary import vary

BOS, PAD, EOS = 0, 1, 2
POSITIONS = 512
Example = tuple[list[int], list[int]]  # source and target with <s> and </s>
Batch = dict[str, Tensor]
Row = dict[str, Any]
SENTENCE_END = re.compile(r"(?<=[.!?\"”])\s+(?=[A-Z\"“\ue000-\ue02f])")
MANNERS = {"pseudo": "Retell:", "line": "One line:", "service": "Service:", "game": "Game:",
           "facts": "Facts:", "deal": "Deal:", "visit": "Notes:",
           "meeting": "Meeting:"}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """Until `until` million tokens: tasks by their share of the tokens, the longest segment to
    denoise in tokens, the padded tokens of a batch.
    """

    until: float
    tasks: dict[str, float]
    segment: int
    budget: int


MAIN = {"chat": 0.34, "prose": 0.17, "gap": 0.10, "pseudo": 0.08, "service": 0.16, "game": 0.07,
        "facts": 0.025, "deal": 0.01, "visit": 0.015, "meeting": 0.005, "narrative": 0.015,
        "line": 0.01}  # fmt: skip
STAGES = [
    Stage(2.0, {"mask": 1.0}, 24, 10_000),
    Stage(4.0, {"mask": 0.6, "chat": 0.25, "prose": 0.15}, 48, 20_000),
    Stage(10.0, {"chat": 0.5, "prose": 0.2, "pseudo": 0.3}, 64, 40_000),
    Stage(30.0, {"chat": 0.4, "prose": 0.15, "gap": 0.1, "pseudo": 0.2, "service": 0.1,
                 "game": 0.05}, 110, 80_000),
    Stage(float("inf"), MAIN, 200, 128_000),
]  # fmt: skip
# While the learning rate falls: more of what the base is for, and dropout.
ANNEAL = Stage(
    float("inf"),
    {"chat": 0.34, "prose": 0.13, "gap": 0.08, "pseudo": 0.10, "service": 0.17, "game": 0.07,
     "facts": 0.03, "deal": 0.01, "visit": 0.015, "meeting": 0.005, "narrative": 0.025,
     "line": 0.012},
    200, 128_000,
)  # fmt: skip


def read_rows(path: Path, split: str) -> list[Row]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [row for row in map(json.loads, file) if row["split"] == split]


class Names:
    """Fill slots with names: the same one for every mention in an example.

    Three in ten names are invented: no list is long enough to teach copying. `blended` ones, two
    for seven known, begin as a known name does.
    """

    def __init__(self, blended: bool = False) -> None:
        rng = np.random.default_rng(0)
        known = {"f": FEMALE, "m": MALE, "x": [*FEMALE, *MALE]}
        self.pool = {g: [*known[g], *invent(g, len(known[g]) * 3 // 7, rng)] for g in GENDERS}
        for gender in GENDERS if blended else ():
            self.pool[gender] += blend(known[gender], len(known[gender]) * 2 // 7, rng)

    def draw(self, rng: np.random.Generator) -> dict[str, str]:
        """The name of every slot; no two persons of an example share one."""
        table: dict[str, str] = {}
        taken: set[str] = set()
        for gender in GENDERS:
            pool = self.pool[gender]
            person = 0
            while person < SLOTS:
                name = pool[int(rng.integers(len(pool)))]
                if name not in taken:
                    taken.add(name)
                    table[slot(gender, person)] = name
                    person += 1
        return table

    @staticmethod
    def fill(text: str, table: dict[str, str]) -> str:
        return SLOT_CHARACTER.sub(lambda found: table[found[0]], text)


def casual(text: str, draw: float) -> str:
    """Sometimes type as in a messenger: no full stop at the end, lower case."""
    if draw < 0.35 and text.endswith(".") and not text.endswith(".."):
        text = text[:-1]
    return text.lower() if draw < 0.15 else text


def typed(turns: list[Turn], rng: np.random.Generator) -> str:
    """A chat as persons type it."""
    return show([Turn(t.speaker, t.gender, casual(t.text, rng.random())) for t in turns])


class Source:
    """Draws examples of each task from one split."""

    def __init__(self, data: Path, split: str, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # Held-out texts have the names and places of the first runs, to be compared with them.
        self.harder = split == "train"
        self.names = Names(blended=self.harder)
        self.places: list[str] = json.loads((data / "places.json").read_text())
        if self.harder:  # words that can only be copied
            self.places += invent("x", len(self.places) // 2, np.random.default_rng(1))
        chats = read_rows(data / "chats.jsonl.xz", split)
        self.chats = [[Turn(*turn) for turn in row["turns"]] for row in chats]
        # Longer texts are drawn more often; messenger chats twice as often as the other chats.
        near = {"chat_chitchat_byu", "chat_synthetic_persona_chat", "chat_topical_chat_valid_test"}
        self.chat_weights = cumulative(
            [len(row["turns"]) * (2 if row["source"] in near else 1) for row in chats]
        )
        prose = read_rows(data / "prose.jsonl.xz", split)
        self.prose = [SENTENCE_END.split(row["text"]) for row in prose]
        self.prose_weights = cumulative([len(row["text"]) for row in prose])
        self.pairs: dict[str, list[Row]] = defaultdict(list)
        for row in read_rows(data / "pairs.jsonl.xz", split):
            self.pairs[row["kind"]].append(row)
        self.narratives = read_rows(data / "narratives.jsonl.xz", split)
        self.mask = tokenizer.token_to_id("<mask>")
        ends = {tokenizer.token_to_id(end) for end in (".", "?", "!", '."', '?"', '!"', "Ċ")}
        self.ends = frozenset(end for end in ends if end is not None)
        self.tasks: dict[str, Callable[[Stage, np.random.Generator], tuple[Any, Any]]] = {
            "mask": self.masked, "chat": self.denoised_chat, "prose": self.denoised_prose,
            "gap": self.gap, "pseudo": self.pseudo, "narrative": self.narrative, "line": self.line,
        }  # fmt: skip

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def window(self, words: float, rng: np.random.Generator) -> list[Turn]:
        """Consecutive turns of a chat, about `words` words in all."""
        turns = self.chats[pick(self.chat_weights, rng)]
        start = end = int(rng.integers(len(turns)))
        if rng.random() < 0.3:
            start = end = 0
        length = 0
        while end < len(turns) and length < words:
            length += len(turns[end].text.split()) + 1
            end += 1
        return turns[start:end]

    def passage(self, words: float, rng: np.random.Generator) -> list[str]:
        """Consecutive sentences of a text, about `words` words in all."""
        sentences = self.prose[pick(self.prose_weights, rng)]
        start = end = int(rng.integers(len(sentences)))
        length = 0
        while end < len(sentences) and length < words:
            length += len(sentences[end].split())
            end += 1
        return sentences[start:end]

    def long(self, stage: Stage, rng: np.random.Generator) -> int:
        """Tokens of a segment: mostly up to the stage's, one in eight longer in the last ones."""
        if stage.segment >= 200 and rng.random() < 0.12:
            return int(rng.integers(200, 470))
        return int(stage.segment * (0.4 + 0.6 * rng.random()))

    def chat_tokens(self, longest: int, rng: np.random.Generator) -> np.ndarray:
        chat = typed(self.window(longest / 1.35, rng), rng)
        text = self.names.fill(chat, self.names.draw(rng))
        return np.array(self.encode(text)[:longest], dtype=np.int64)

    def prose_tokens(self, longest: int, rng: np.random.Generator) -> np.ndarray:
        text = " ".join(self.passage(longest / 1.25, rng))
        return np.array(self.encode(text)[:longest], dtype=np.int64)

    def masked(self, stage: Stage, rng: np.random.Generator) -> tuple[Any, Any]:
        draw = self.prose_tokens if rng.random() < 0.4 else self.chat_tokens
        target = draw(stage.segment, rng)
        return mask_tokens(target, 0.15, self.mask, rng), target

    def denoised(self, target: np.ndarray, rng: np.random.Generator) -> tuple[Any, Any]:
        source = target
        if rng.random() < 0.2:
            source = permute_sentences(source, self.ends, rng)
        return infill(source, float(rng.uniform(0.15, 0.35)), self.mask, rng), target

    def denoised_chat(self, stage: Stage, rng: np.random.Generator) -> tuple[Any, Any]:
        return self.denoised(self.chat_tokens(self.long(stage, rng), rng), rng)

    def denoised_prose(self, stage: Stage, rng: np.random.Generator) -> tuple[Any, Any]:
        return self.denoised(self.prose_tokens(self.long(stage, rng), rng), rng)

    def gap(self, stage: Stage, rng: np.random.Generator) -> tuple[Any, Any]:
        """One or two whole sentences are missing, and only they are written.

        Gap sentences (Zhang et al. 2020, section 3.1), chosen at random.
        """
        while True:
            sentences = self.passage(self.long(stage, rng) / 1.25, rng)
            if len(sentences) > 2:
                break
        size = 1 + (len(sentences) > 5 and rng.random() < 0.4)
        first = int(rng.integers(len(sentences) - size + 1))
        before, after = sentences[:first], sentences[first + size :]
        source = [*self.encode(" ".join(before)), self.mask, *self.encode(" " + " ".join(after))]
        return source, self.encode(" ".join(sentences[first : first + size]))

    def pseudo(self, stage: Stage, rng: np.random.Generator) -> tuple[Any, Any]:
        """Salient turns retold in the third person by rules (`pseudo.py`)."""
        while True:
            turns = self.window(float(rng.uniform(25, stage.segment)), rng)
            told = summarize(turns, rng) if len(turns) > 2 else None
            if told:
                table = self.names.draw(rng)
                chat = self.names.fill(typed(turns, rng), table)
                return self.told("pseudo", chat, self.names.fill(told, table), rng)

    def pair(self, kind: str, rng: np.random.Generator) -> tuple[Any, Any]:
        row = self.pairs[kind][int(rng.integers(len(self.pairs[kind])))]
        texts = [row["dialogue"], row["summary"]]
        if kind in {"service", "deal", "facts"}:
            texts = vary(texts, self.places, rng)
        table = self.names.draw(rng)
        return self.told(kind, *(self.names.fill(text, table) for text in texts), rng)

    def retold(self, field: str, kind: str, rng: np.random.Generator) -> tuple[Any, Any]:
        row = self.narratives[int(rng.integers(len(self.narratives)))]
        texts = vary([row["dialogue"], row[field]], self.places, rng)
        table = self.names.draw(rng)
        return self.told(kind, *(self.names.fill(text, table) for text in texts), rng)

    def narrative(self, stage: Stage, rng: np.random.Generator) -> tuple[Any, Any]:
        return self.retold("narrative", "narrative", rng)

    def line(self, stage: Stage, rng: np.random.Generator) -> tuple[Any, Any]:
        return self.retold("summary", "line", rng)

    def told(
        self, kind: str, dialogue: str, summary: str, rng: np.random.Generator
    ) -> tuple[Any, Any]:
        source = self.encode(dialogue)
        if kind in {"narrative", "line"} and rng.random() < 0.4:  # not to be known by its words
            source = mask_tokens(np.array(source), 0.06, self.mask, rng).tolist()
        manner = self.encode(MANNERS[kind] + "\n") if kind in MANNERS else []
        if kind == "service" and self.harder and rng.random() < 0.3:  # retold, not copied
            manner = []
        return [*manner, *source], self.encode(summary)

    def example(self, task: str, stage: Stage, rng: np.random.Generator) -> Example:
        while True:
            draw = self.tasks.get(task)
            source, target = draw(stage, rng) if draw else self.pair(task, rng)
            if 3 < len(source) <= POSITIONS - 2 and 3 < len(target) <= POSITIONS - 2:
                return [BOS, *map(int, source), EOS], [BOS, *map(int, target), EOS]

    def batches(self, stage: Stage, rng: np.random.Generator, rounds: int) -> Iterator[Batch]:
        """About `rounds` batches of like length, tasks in the stage's shares, shuffled."""
        examples: list[Example] = []
        for task, share in stage.tasks.items():
            wanted = share * rounds * stage.budget
            while wanted > 0:
                examples.append(self.example(task, stage, rng))
                wanted -= len(examples[-1][0]) + len(examples[-1][1])
        parts = chunks(examples, stage.budget)
        for place in rng.permutation(len(parts)):
            yield collate(parts[place])


def cumulative(weights: list[float]) -> np.ndarray:
    return np.cumsum(weights) / sum(weights)


def pick(weights: np.ndarray, rng: np.random.Generator) -> int:
    return int(np.searchsorted(weights, rng.random()))


def chunks(examples: list[Example], budget: int) -> list[list[Example]]:
    """Sort by length and cut into parts of at most `budget` padded positions.

    By the source's length in steps of 16, then by the target's, rising and falling in turn, so that
    neighbours are alike in both.
    """

    def place(pair: Example) -> tuple[int, int]:
        step = len(pair[0]) // 16
        return step, len(pair[1]) if step % 2 else -len(pair[1])

    examples = sorted(examples, key=place)
    parts: list[list[Example]] = [[]]
    source = target = 0
    for pair in examples:
        source, target = max(source, len(pair[0])), max(target, len(pair[1]))
        if parts[-1] and (source + target) * (len(parts[-1]) + 1) > budget:
            parts.append([])
            source, target = len(pair[0]), len(pair[1])
        parts[-1].append(pair)
    return [part for part in parts if part]


def collate(examples: list[Example]) -> Batch:
    """Padded to a multiple of eight; the decoder reads `</s> <s> ...` as BART does."""

    def pad(rows: list[list[int]]) -> Tensor:
        width = -(-max(map(len, rows)) // 8) * 8
        return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])

    source, labels = pad([pair[0] for pair in examples]), pad([pair[1] for pair in examples])
    start = torch.full((len(examples), 1), EOS)
    return {
        "input_ids": source,
        "attention_mask": (source != PAD).long(),
        "decoder_input_ids": torch.cat([start, labels[:, :-1]], 1),
        "labels": labels,
    }
