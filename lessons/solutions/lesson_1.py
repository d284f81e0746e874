"""Lesson 1: why low rank, solved."""

import math

import torch
from torch import Tensor


def best_factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    U, sigma, Vt = torch.linalg.svd(delta, full_matrices=False)
    return Vt[:rank], U[:, :rank] * sigma[:rank]


def rank_for(delta: Tensor, share: float) -> int:
    energy = torch.linalg.svdvals(delta).square().cumsum(0)  # (k,)
    return int((energy < share * energy[-1]).sum()) + 1


def break_even(out: int, in_: int) -> int:
    return math.ceil(out * in_ / (out + in_))
