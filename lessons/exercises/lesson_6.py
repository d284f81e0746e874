"""Lesson 6: four bits."""

from torch import Tensor


def bits(block: int, scales_block: int | None = None) -> float:
    """Bits a weight: four, and the share of its block's scale.

    A scale is float32. With `scales_block` it has 8 bits, and that many scales share one float32.
    """
    raise NotImplementedError


def pack_pairs(codes: Tensor) -> Tensor:
    """Codes (n,) in 0..15 as bytes (n / 2,) uint8: the first of each pair in the high half.

    Shift or multiply by 16. The dtype of `codes` may be int64.
    """
    raise NotImplementedError


def best_levels(values: Tensor, levels: Tensor, steps: int) -> Tensor:
    """Lloyd's algorithm: levels (k,), rising, with a smaller squared error on values (n,).

    A level that is nearest to no value does not move.
    """
    raise NotImplementedError
