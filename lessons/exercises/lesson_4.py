"""Lesson 4: merging. W (out, in) frozen, A (r, in), B (out, r), s the scale."""

from torch import Tensor


def merge(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """W + s B A in the dtype of W, rounded once. A and B are float32, W bfloat16 or float16."""
    raise NotImplementedError


def branch_flops(out: int, in_: int, rank: int) -> int:
    """Operations that s (x A^T) B^T adds for one token; a dot product of n numbers counts 2 n.

    Count the two matrix products only: neither the scale nor the sum.
    """
    raise NotImplementedError


def stays(W: Tensor, delta: Tensor) -> Tensor:
    """A mask (out, in): whether W + delta, summed in float32 and rounded to bfloat16, is W."""
    raise NotImplementedError
