"""The figures that the terminal and report.html both show, as tables of text."""

from ..evaluation import nonsense
from ..evaluation.compare import Evaluation
from ..evaluation.rouge import MEASURES

Table = list[tuple[str, ...]]
"""Rows of cells; the first row is the head, the first cell of a row its name."""


def score_table(evaluation: Evaluation) -> Table:
    """ROUGE and length of both models and their paired difference, with 95% intervals."""
    base, finetuned, change = (evaluation.intervals[k] for k in ("base", "finetuned", "difference"))
    rows = [(m, f"{base[m]:.2f}", f"{finetuned[m]:.2f}", f"{change[m]:+.2f}") for m in MEASURES]
    return [("", "base", "fine-tuned", "difference"), *rows]


def nonsense_table(evaluation: Evaluation) -> Table:
    """Per cent of the summaries with each kind of nonsense; empty if it was not measured."""
    if "reference" not in evaluation.intervals:
        return []
    sides = [evaluation.intervals[side] for side in ("base", "finetuned", "reference")]
    kinds = nonsense.MEASURES
    names = [kind.replace("foreign_", "invented ").replace("_", "-") for kind in kinds]
    rows = [
        (name, *(f"{side[kind]:.1f}" for side in sides))
        for name, kind in zip(names, kinds, strict=True)
    ]
    return [("", "base", "fine-tuned", "reference"), *rows]


def nonsense_note(evaluation: Evaluation) -> list[str]:
    """A note where people's own summaries look like nonsense: they are not in English."""
    if evaluation.intervals["reference"]["non_words"].mean <= 50:
        return []
    return ["Most references have a word outside the list: the words are compared with English."]


def duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.1f} minutes"
