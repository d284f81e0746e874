"""A classroom mistake: the scale is 1 / r, so that alpha has no effect, and the base trains too."""

import torch
from torch import Tensor, nn


class LoRALinear(nn.Linear):
    def __init__(self, in_features: int, out_features: int, rank: int, dropout: float) -> None:
        super().__init__(in_features, out_features)  # the second mistake: it is not frozen
        self.A = nn.Parameter(torch.randn(rank, in_features) / in_features**0.5)
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        self.scale, self.dropout = 1 / rank, nn.Dropout(dropout)  # the first mistake

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * (self.dropout(x) @ self.A.T @ self.B.T)


def make(linear: nn.Linear, rank: int, alpha: float, dropout: float) -> nn.Module:
    layer = LoRALinear(linear.in_features, linear.out_features, rank, dropout).to(
        linear.weight.dtype
    )
    layer.load_state_dict(linear.state_dict(), strict=False)
    return layer
