"""A student's layer, and a right one: `python -m minilora conformance student.py:make`."""

import torch
from torch import Tensor, nn


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scale, self.dropout, self.kept = alpha / rank, nn.Dropout(dropout), None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            return self.base(x) + self.scale * (self.dropout(x) @ self.A.T @ self.B.T)
        if self.training:
            raise RuntimeError("unmerge before training")
        return self.base(x)

    @torch.no_grad()
    def merge(self) -> None:
        if self.kept is None:
            self.kept = self.base.weight.clone()
            self.base.weight += self.scale * self.B @ self.A

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.kept is not None:
            self.base.weight.copy_(self.kept)
            self.kept = None


make = LoRA
