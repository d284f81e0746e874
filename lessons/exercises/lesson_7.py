"""Lesson 7: which layers, which rank. A shape is (out, in)."""

from collections.abc import Sequence

from torch import Tensor


def trained_numbers(shapes: Sequence[tuple[int, int]], rank: int) -> int:
    """The numbers in all A (r, in) and B (out, r) of adapters on weights of these shapes."""
    raise NotImplementedError


def rank_within(shapes: Sequence[tuple[int, int]], budget: int) -> int:
    """The largest rank, the same for all, that trains at most `budget` numbers; 0 if none does.

    No rank may be above the smaller side of any of the weights.
    """
    raise NotImplementedError


def paired_interval(first: Tensor, second: Tensor, resamples: int = 2000) -> tuple[float, float]:
    """Bounds of the 95% percentile bootstrap interval of mean(first - second).

    Both are (n,), scores of the same n dialogues in the same order. Draw n dialogues with
    replacement, `resamples` times; take the 2.5% and 97.5% quantiles of the mean differences.
    """
    raise NotImplementedError
