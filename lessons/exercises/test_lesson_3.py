"""Lesson 3: checked against the library's scale and against measured steps."""

import pytest
import torch
from torch import nn

from minilora import LoRALinear


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_stays(work, rslora):
    base = nn.Linear(40, 40)
    old = LoRALinear(base, rank=4, alpha=6, rslora=rslora)
    alpha = work.alpha_for(6, 4, 36, rslora)
    assert alpha > 6
    assert LoRALinear(base, 36, alpha, rslora=rslora).scale == pytest.approx(old.scale)


def way(rank, optimizer, rslora):
    """The p of the first step, averaged over starts."""
    torch.manual_seed(0)
    base, x, target = nn.Linear(128, 32, bias=False), torch.randn(4, 128), torch.randn(4, 32)
    M = torch.autograd.grad((base(x) - target).square().sum(), base.weight)[0]
    total = 0.0
    for _ in range(100):
        layer = LoRALinear(base, rank, alpha=8, rslora=rslora)
        optim = getattr(torch.optim, optimizer)([layer.lora_A, layer.lora_B], lr=1e-4)
        (layer(x) - target).square().sum().backward()
        optim.step()
        total -= (layer.delta() * M).sum().item()
    return total


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_the_first_step_is_as_far_as_measured(work, optimizer, rslora):
    measured = way(32, optimizer, rslora) / way(2, optimizer, rslora)
    expected = work.step_ratio(2, 32, optimizer, rslora)
    assert measured == pytest.approx(expected, rel=0.25)  # the starts are random; 16 ** 0.5 is 4


def test_the_scale_is_folded_into_both_factors_alike(work):
    A, B = torch.randn(3, 12), torch.randn(9, 3)
    A2, B2 = work.folded(A.clone(), B.clone(), 2.5)
    torch.testing.assert_close(B2 @ A2, 2.5 * B @ A)
    torch.testing.assert_close(A2 / A, (B2 / B)[:3, :1].expand(3, 12) * torch.ones(3, 12))
