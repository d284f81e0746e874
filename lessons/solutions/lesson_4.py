"""Lesson 4: merging, solved."""

from torch import Tensor


def merge(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    return (W.float() + s * (B @ A)).to(W.dtype)  # the sum in float32, then one rounding


def branch_flops(out: int, in_: int, rank: int) -> int:
    return 2 * rank * in_ + 2 * out * rank


def stays(W: Tensor, delta: Tensor) -> Tensor:
    return (W.float() + delta.float()).to(W.dtype) == W
