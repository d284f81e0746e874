"""LoRA as a parametrization of the weight, in minLoRA's way: W is computed anew at every call."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Update(nn.Module):
    """W -> W + s B A. Dropout, on one row of ones, drops columns of A: the inputs of all rows."""

    def __init__(self, out: int, in_: int, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, in_).uniform_(-1, 1) / in_**0.5)
        self.lora_B = nn.Parameter(torch.zeros(out, rank))
        self.register_buffer("ones", torch.ones(1, in_))
        self.scale, self.dropout = alpha / rank, nn.Dropout(dropout)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * self.lora_B @ (self.lora_A * self.dropout(self.ones))


def make(linear: nn.Linear, rank: int, alpha: float, dropout: float) -> nn.Module:
    update = Update(*linear.weight.shape, rank, alpha, dropout)
    return parametrize.register_parametrization(linear, "weight", update)


layer = {
    "make": make,
    "merge": lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    # as in minLoRA, nothing is frozen: the optimizer is given A and B
    "trainable": lambda layer: [p for n, p in layer.named_parameters() if "lora_" in n],
}
