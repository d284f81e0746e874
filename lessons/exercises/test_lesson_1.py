"""Lesson 1: checked against the bound, against other matrices, and by counting."""

import pytest
import torch
from torch import nn

from minilora import LoRALinear


def test_the_factors_reach_the_bound(work):
    delta = torch.randn(9, 14, dtype=torch.float64)
    sigma = torch.linalg.svdvals(delta)
    for rank in (1, 4, 9):
        A, B = work.best_factors(delta, rank)
        assert A.shape == (rank, 14)
        assert B.shape == (9, rank)
        error = (delta - B @ A).norm()
        torch.testing.assert_close(error, sigma[rank:].norm(), atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize(("share", "rank"), [(0.5, 1), (0.7, 2), (0.95, 3), (0.99, 4), (1.0, 4)])
def test_the_rank_is_the_smallest_that_suffices(work, share, rank):
    U, V = (torch.linalg.qr(torch.randn(n, 4, dtype=torch.float64)).Q for n in (8, 6))
    energy = torch.tensor([0.64, 0.25, 0.08, 0.03], dtype=torch.float64)
    delta = (U * energy.sqrt()) @ V.T
    assert work.rank_for(delta, share - 1e-9) == rank


@pytest.mark.parametrize(("out", "in_"), [(16, 16), (16, 64), (10, 7), (3, 5)])
def test_at_break_even_nothing_is_saved(work, out, in_):
    def numbers(rank):
        layer = LoRALinear(nn.Linear(in_, out, bias=False), rank)
        return layer.lora_A.numel() + layer.lora_B.numel()

    rank = work.break_even(out, in_)
    assert numbers(rank) >= out * in_
    assert rank == 1 or numbers(rank - 1) < out * in_
