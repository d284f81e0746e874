"""Two models' summaries of the same dialogues, scored and compared.

Every score has a 95% bootstrap interval. The difference of the two models is paired by dialogue: it
is the number to look at. Both models find the same dialogues hard, so the intervals of the two
scores overlap more often than the difference is uncertain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..data.reading import Example
from ..errors import UserError
from .nonsense import shares
from .rouge import MEASURES, Interval, bootstrap, rouge


@dataclass(frozen=True)
class Summary:
    text: str
    tokens: int
    """As transformers counts gen_len: with start and end tokens, without padding."""


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
    """By side ("base", "finetuned", "difference") and measure (`MEASURES`)."""
    examples: list[Compared]
    """In the order of the data."""
    nonsense: dict[str, dict[str, Interval]] | None = None
    """Shares of the summaries in per cent, by side ("base", "finetuned", "reference") and kind
    (`nonsense.MEASURES`). None: the texts are not in Latin letters."""

    @property
    def n(self) -> int:
        return len(self.examples)

    @property
    def base(self) -> dict[str, float]:
        """The mean of each measure."""
        return {name: interval.mean for name, interval in self.intervals["base"].items()}

    @property
    def finetuned(self) -> dict[str, float]:
        return {name: interval.mean for name, interval in self.intervals["finetuned"].items()}

    def to_dict(self) -> dict[str, Any]:
        """The content of evaluation.json: [low, high], and [mean, low, high] for differences."""
        bounds = {
            side: {m: list(x if side == "difference" else x[1:]) for m, x in row.items()}
            for side, row in self.intervals.items()
        }
        means: dict[str, dict[str, float]] = {"base": self.base, "finetuned": self.finetuned}
        for side, row in (self.nonsense or {}).items():
            means[side] = means.get(side, {}) | {kind: share.mean for kind, share in row.items()}
            bounds[side] = bounds.get(side, {}) | {kind: list(x[1:]) for kind, x in row.items()}
        return {
            "data": self.data,
            "split": self.split,
            "n": self.n,
            **means,
            "intervals": bounds,
            "generation": self.generation,
            "examples": [asdict(example) for example in self.examples],
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
        Compared(
            e.id, e.dialogue, "\n".join(e.references), b.text, f.text, r["rouge1"], s["rouge1"]
        )
        for e, b, f, r, s in zip(examples, base, finetuned, before, after, strict=True)
    ]
    dialogues = [example.dialogue for example in examples]
    written = {"base": base, "finetuned": finetuned}
    texts = {side: [summary.text for summary in found] for side, found in written.items()}
    texts["reference"] = [example.summary for example in examples]
    found = {side: shares(summaries, dialogues) for side, summaries in texts.items()}
    nonsense = {side: row for side, row in found.items() if row is not None}
    return Evaluation(
        data, split, dict(generation or {}), intervals, compared,
        nonsense if len(nonsense) == len(texts) else None,
    )  # fmt: skip


def _measure(summaries: Sequence[Summary], examples: Sequence[Example]) -> list[dict[str, float]]:
    scores = rouge([s.text for s in summaries], [example.references for example in examples])
    return [row | {"gen_len": s.tokens} for row, s in zip(scores, summaries, strict=True)]
