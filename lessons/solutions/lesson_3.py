"""Lesson 3: scale and rank, solved."""

from math import sqrt

from torch import Tensor


def alpha_for(alpha: float, rank: int, new_rank: int, rslora: bool) -> float:
    times = new_rank / rank
    return alpha * (sqrt(times) if rslora else times)


def step_ratio(rank: int, new_rank: int, optimizer: str, rslora: bool) -> float:
    exponent = {"SGD": -1.0, "Adam": 0.0}[optimizer]
    if rslora:
        exponent += {"SGD": 1.0, "Adam": 0.5}[optimizer]
    return float((new_rank / rank) ** exponent)


def folded(A: Tensor, B: Tensor, s: float) -> tuple[Tensor, Tensor]:
    # Not the same training: the gradients change with c, and Adam's steps do not grow with c.
    return sqrt(s) * A, sqrt(s) * B
