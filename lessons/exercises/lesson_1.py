"""Lesson 1: why low rank. Delta (out, in) is an update, A (r, in), B (out, r)."""

from torch import Tensor


def best_factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B with B A as near to delta as any matrix of that rank (Eckart and Young)."""
    raise NotImplementedError


def rank_for(delta: Tensor, share: float) -> int:
    """The smallest r whose best approximation holds at least `share` (below 1) of ||delta||^2."""
    raise NotImplementedError


def break_even(out: int, in_: int) -> int:
    """The smallest r at which A and B together have at least as many numbers as W."""
    raise NotImplementedError
