"""Lesson 5: checked against real tensors and against autograd."""

import weakref

import torch
import torch.nn.functional as F
from torch import nn


def test_the_bytes_are_those_of_the_tensors(work):
    model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5))
    model[0].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(torch.randn(2, 10)).sum().backward()
    optimizer.step()
    moments = [s for e in optimizer.state.values() for s in e.values() if s.dim() > 0]
    found = work.training_bytes(
        sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained)
    )
    assert found == {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in trained),
        "optimizer": sum(s.nbytes for s in moments),
    }


def test_each_storage_is_counted_once_and_the_inputs_are_not(work):
    x = torch.randn(8, 16, requires_grad=True)
    assert work.kept_bytes(lambda x: x.sin(), x) == 0  # keeps x, which is there anyway
    assert work.kept_bytes(lambda x: x.exp(), x) == x.nbytes  # keeps its result
    assert work.kept_bytes(lambda x: x.exp() * x, x) == x.nbytes  # twice the same result
    assert work.kept_bytes(lambda x: x.exp()[1:].sin(), x) == x.nbytes  # a view of the same result

    def twice(x):
        y = x.exp()
        return y * y.tanh()  # y and tanh(y)

    assert work.kept_bytes(twice, x) == 2 * x.nbytes


def test_a_frozen_linear_keeps_nothing_but_its_weight(work):
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    W = torch.randn(9, 12, dtype=torch.float64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.shape), t)[1], lambda t: t
    ):
        y = work.frozen_linear(x, W)
    assert y.requires_grad
    assert [sorted(shape) for shape in kept] == [[9, 12]]  # W, or its transpose
    torch.testing.assert_close(y, F.linear(x, W))
    G = torch.randn(7, 9, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(f, x, G) for f in (y, F.linear(x, W))))
    z = 2 * x
    alive = weakref.ref(z)
    y = work.frozen_linear(z, W)
    del z
    assert y.requires_grad
    assert alive() is None, "the input is kept"
