"""What the tests of four bits share."""

import torch
from torch import Tensor, nn

import minilora
from tests.conftest import tiny_bart

MIXED = ("q_proj", "v_proj", "fc1")


def weight(*shape: int, seed: int = 0, scale: float = 0.03) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(out: int, in_: int, seed: int = 0, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(in_, out, bias=bias)
    layer.weight.data = weight(out, in_, seed=seed)
    return layer


def quantized_bart(**options: object) -> nn.Module:
    model = tiny_bart(d_model=32)
    minilora.quantize(model, **options)
    return model
