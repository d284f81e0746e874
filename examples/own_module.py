"""LoRA on a module of your own: python examples/own_module.py

A network learns one task; an adapter of rank 2 then learns a similar one. The weights of the
network do not change, so the second task needs only a file of a few kilobytes.
"""

import torch
from torch import Tensor, nn

import minilora

torch.manual_seed(0)
first = torch.randn(16, 16) / 4
second = first + torch.randn(16, 1) @ torch.randn(1, 16) / 4  # differs by an update of rank 1


def error(model: nn.Module, task: Tensor) -> Tensor:
    """Mean squared error on y = tanh(x task), over new random x (n, 16)."""
    x = torch.randn(256, 16)
    return (model(x) - torch.tanh(x @ task)).square().mean()


def fit(model: nn.Module, task: Tensor) -> None:
    optimizer = torch.optim.Adam(minilora.trainable_parameters(model), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        error(model, task).backward()
        optimizer.step()


network = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))
fit(network, first)
print(minilora.inject(network, minilora.LoRAConfig(rank=2, alpha=4, targets=("0", "2"))))
print(f"second task before: {error(network, second).item():.4f}")
fit(network, second)
print(f"second task after: {error(network, second).item():.4f}")
with minilora.disabled(network):
    print(f"first task without the adapter: {error(network, first).item():.4f}")
minilora.save_adapter(network, "second-task")
