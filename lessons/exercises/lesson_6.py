"""Lesson 6: four bits."""

from torch import Tensor


def bits(block: int, scales_block: int | None = None) -> float:
    """Bits a weight: four, and the share of its block's scale.

    A scale is float32; with `scales_block` it is 8 bits, and so many scales share one float32.
    """
    raise NotImplementedError


def pack_pairs(codes: Tensor) -> Tensor:
    """Codes (n,) in 0..15 as bytes (n / 2,) uint8: the first of each pair in the high half."""
    raise NotImplementedError


def best_levels(values: Tensor, levels: Tensor, steps: int) -> Tensor:
    """Lloyd's algorithm: levels (k,), rising, with a smaller squared error on values (n,).

    A level that no value is nearest to stays where it is.
    """
    raise NotImplementedError
