"""Lesson 7: which layers, which rank, solved."""

from collections.abc import Sequence

import torch
from torch import Tensor


def trained_numbers(shapes: Sequence[tuple[int, int]], rank: int) -> int:
    return rank * sum(out + in_ for out, in_ in shapes)


def rank_within(shapes: Sequence[tuple[int, int]], budget: int) -> int:
    return min(budget // trained_numbers(shapes, 1), *(min(shape) for shape in shapes))


def paired_interval(first: Tensor, second: Tensor, resamples: int = 2000) -> tuple[float, float]:
    difference = (first - second).double()  # (n,): paired before anything is drawn
    drawn = torch.randint(len(difference), (resamples, len(difference)))
    low, high = difference[drawn].mean(dim=1).quantile(torch.tensor([0.025, 0.975]).double())
    return low.item(), high.item()
