"""Lesson 4: checked against float64, PyTorch's own counter, and the grid of bfloat16."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(work, dtype):
    W, A, B = torch.randn(64, 48).to(dtype), torch.randn(3, 48), torch.randn(64, 3)
    merged = work.merge(W.clone(), A, B, 0.01)
    assert merged.dtype == dtype
    assert not torch.equal(merged, W)
    exact = W.double() + 0.01 * B.double() @ A.double()
    nearest = exact.to(dtype)
    # The float32 sum may fall on the other side of a tie; rounding the delta first misses 2%.
    assert (merged != nearest).double().mean() < 0.005


def test_the_operations_are_those_that_pytorch_counts(work):
    x, A, B = torch.randn(1, 48), torch.randn(3, 48), torch.randn(64, 3)
    with FlopCounterMode(display=False) as counter:
        x @ A.T @ B.T
    assert work.branch_flops(64, 48, 3) == counter.get_total_flops()


def test_what_is_below_half_a_step_stays(work):
    W = torch.tensor([[1.0, 1.0, 1.0, 4.0, 0.0, -1.0, 1.0]]).bfloat16()  # a step above 1 is 2**-7
    delta = torch.tensor([[0.003, 0.005, -0.003, 0.005, 1e-20, 0.001, 0.00391]])
    # Below 1 the steps are half as wide: -0.003 changes an entry that +0.003 does not change.
    # 0.00391 is above half a step, but rounded to bfloat16 first it would be exactly half a step.
    expected = torch.tensor([[True, False, False, True, False, True, False]])
    assert torch.equal(work.stays(W, delta), expected)
