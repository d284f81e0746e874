"""Lesson 2: checked against autograd and against the library's layer, in float64."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from minilora import LoRALinear, conformance


def parts():
    """x, W, A, B, s, mask, G with nothing zero, symmetric or a power of two about them."""
    x, W, A, B, G = (
        torch.randn(*shape, dtype=torch.float64)
        for shape in ((7, 12), (9, 12), (3, 12), (9, 3), (7, 9))
    )
    mask = F.dropout(torch.ones_like(x), 0.3)
    return x, W, A, B, 7 / 3, mask, G


def test_the_base_sees_no_dropout_and_the_branch_does(work):
    x, W, A, B, s, mask, _ = parts()
    layer = LoRALinear(nn.Linear(12, 9, bias=False).double(), rank=3, alpha=7)
    with torch.no_grad():
        layer.base.weight.copy_(W), layer.lora_A.copy_(A), layer.lora_B.copy_(B)
    torch.testing.assert_close(work.lora_forward(x, W, A, B, s, torch.ones_like(x)), layer(x))
    expected = x @ W.T + F.linear(x * mask, layer.delta())
    torch.testing.assert_close(work.lora_forward(x, W, A, B, s, mask), expected)


def test_the_layer_made_of_it_passes_all_that_applies(work):
    class Layer(nn.Module):
        def __init__(self, base, rank, alpha, dropout):
            super().__init__()
            self.base, self.s, self.p = base.requires_grad_(False), alpha / rank, dropout
            self.A = nn.Parameter(torch.randn(rank, base.in_features) / 7)
            self.B = nn.Parameter(torch.zeros(base.out_features, rank))

        def forward(self, x):
            mask = F.dropout(torch.ones_like(x), self.p, self.training)
            return work.lora_forward(x, self.base.weight, self.A, self.B, self.s, mask)

    Layer(nn.Linear(5, 4, bias=False), 2, 3, 0.0)(torch.ones(2, 5))  # written at all?
    linear = partial(nn.Linear, bias=False)
    report = conformance.check(Layer, linear=linear)
    # The lesson states x (n, in), and no order of the sums: other shapes and the last bit are free.
    failed = set(report.named("failed")) - {"start", "inputs"}
    assert not failed, f"\n{report}"


def test_the_gradients_are_those_of_autograd(work):
    x, W, A, B, s, mask, G = parts()
    A.requires_grad_(), B.requires_grad_()
    y = x @ W.T + s * F.linear(F.linear(x * mask, A), B)
    expected = torch.autograd.grad(y, [A, B], G)
    with torch.no_grad():
        torch.testing.assert_close(work.lora_gradients(x, A, B, s, mask, G), expected)


def test_the_first_step_is_that_of_sgd_on_a_layer(work):
    x, W, A, _, s, _, G = parts()
    layer = LoRALinear(nn.Linear(12, 9, bias=False).double(), rank=3, alpha=7)
    with torch.no_grad():
        layer.base.weight.copy_(W), layer.lora_A.copy_(A)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    layer(x).backward(G)
    optimizer.step()
    assert layer.delta().norm() > 0
    torch.testing.assert_close(work.first_step(A, G.T @ x, s, 0.1), layer.delta())
