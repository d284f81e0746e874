"""Two models' summaries of the same dialogues, scored and compared.

Every score has a 95% bootstrap interval. The difference of the two models is paired by dialogue: it
is the number to look at. Both models find the same dialogues hard, so the intervals of the two
scores can overlap although the difference is certain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..data.reading import Example
from ..errors import UserError
from .nonsense import shares
from .rouge import MEASURES, Interval, bootstrap, rouge, tokenizer_for


@dataclass(frozen=True)
class Summary:
    text: str
    tokens: int
    """As transformers counts gen_len: without padding; T5's start token is its padding token."""


@dataclass(frozen=True)
class Compared:
    """A dialogue with its reference and both models' summaries."""

    id: str
    dialogue: str
    reference: str
    base: str
    finetuned: str
    rouge1_base: float
    rouge1_finetuned: float
    more_references: tuple[str, ...] = ()
    """Further references; each ROUGE measure takes the best score."""

    @property
    def references(self) -> tuple[str, ...]:
        return (self.reference, *self.more_references)

    @property
    def gain(self) -> float:
        """In ROUGE-1, by the fine-tuning."""
        return self.rouge1_finetuned - self.rouge1_base


@dataclass(frozen=True)
class Evaluation:
    data: str
    split: str
    generation: dict[str, Any]
    intervals: dict[str, dict[str, Interval]]
    """By side and measure: "base" and "finetuned" have `rouge.MEASURES` and `nonsense.MEASURES`,
    their "difference" has the former, the "reference" the latter. Texts that are not in Latin
    letters have no nonsense measures and no "reference"."""
    examples: list[Compared]
    """In the order of the data."""

    @property
    def n(self) -> int:
        return len(self.examples)

    @property
    def references(self) -> list[str]:
        """The references of all dialogues."""
        return [text for example in self.examples for text in example.references]

    def to_dict(self) -> dict[str, Any]:
        """The content of evaluation.json: [low, high], and [mean, low, high] for differences."""
        means, bounds = {}, {}
        for side, row in self.intervals.items():
            if side == "difference":
                bounds[side] = {name: list(interval) for name, interval in row.items()}
            else:
                means[side] = {name: interval.mean for name, interval in row.items()}
                bounds[side] = {name: [x.low, x.high] for name, x in row.items()}
        return {
            "data": self.data,
            "split": self.split,
            "n": self.n,
            **means,
            "rouge_tokenizer": tokenizer_for(self.references),
            "intervals": bounds,
            "generation": self.generation,
            "examples": [
                {name: value for name, value in asdict(example).items() if value != ()}
                for example in self.examples
            ],
        }


def compare(
    base: Sequence[Summary],
    finetuned: Sequence[Summary],
    examples: Sequence[Example],
    *,
    data: str = "",
    split: str = "test",
    generation: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Score both models' summaries of the same dialogues, all in the order of `examples`.

    Raises:
        UserError: there are no dialogues.
    """
    if not examples:
        raise UserError(f"nothing to evaluate: the {split} split of {data} holds no dialogue")
    before, after = _measure(base, examples), _measure(finetuned, examples)
    change = [{m: b[m] - a[m] for m in MEASURES} for a, b in zip(before, after, strict=True)]
    intervals = {
        side: {m: bootstrap([row[m] for row in rows]) for m in MEASURES}
        for side, rows in (("base", before), ("finetuned", after), ("difference", change))
    }
    compared = [
        Compared(e.id, e.dialogue, e.summary, b.text, f.text, r["rouge1"], s["rouge1"], e.more)
        for e, b, f, r, s in zip(examples, base, finetuned, before, after, strict=True)
    ]
    dialogues = [e.dialogue for e in compared]
    nonsense = {
        side: shares([getattr(e, side) for e in compared], dialogues)
        for side in ("base", "finetuned", "reference")
    }
    if None not in nonsense.values():
        for side, row in nonsense.items():
            intervals[side] = intervals.get(side, {}) | (row or {})
    return Evaluation(data, split, dict(generation or {}), intervals, compared)


def _measure(summaries: Sequence[Summary], examples: Sequence[Example]) -> list[dict[str, float]]:
    scores = rouge([s.text for s in summaries], [example.references for example in examples])
    return [row | {"gen_len": s.tokens} for row, s in zip(scores, summaries, strict=True)]
