"""Lesson 3: scale and rank. A (r, in), B (out, r), s = alpha / r or alpha / sqrt(r)."""

from torch import Tensor


def alpha_for(alpha: float, rank: int, new_rank: int, rslora: bool) -> float:
    """The alpha that gives `new_rank` the scale that `alpha` gives `rank`."""
    raise NotImplementedError


def step_ratio(rank: int, new_rank: int, optimizer: str, rslora: bool) -> float:
    """The p at `new_rank` divided by p at `rank`, expected, for the same alpha and learning rate.

    The optimizer is "SGD" or "Adam".
    """
    raise NotImplementedError


def folded(A: Tensor, B: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """(A', B') with B' A' = s B A, where A' = c A and B' = c B for one number c > 0."""
    raise NotImplementedError
