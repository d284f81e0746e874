"""A classroom mistake: A and B both start at zero.

dL/dB = s G^T (x A^T) is zero where A is, and dL/dA = s (G B)^T x where B is. The layer computes
what the base computes, before training and after it.
"""

import torch
from torch import Tensor, nn


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.zeros(rank, base.in_features))  # the mistake
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scale, self.dropout = alpha / rank, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (self.dropout(x) @ self.A.T @ self.B.T)


make = LoRA
