"""The start: the output is the base's, and yet B learns."""

import math

import pytest
import torch
from torch import Tensor, nn

from minilora import LoRALinear
from minilora.initialization import STARTS

RANK, IN, OUT = 8, 256, 128


def start(init: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    A, B = torch.full((RANK, IN), torch.nan), torch.full((OUT, RANK), torch.nan)
    base = nn.Identity()
    assert STARTS[init](base, A, B, 1.0) is base
    return A, B


def test_kaiming_is_uniform_within_one_over_the_root_of_in() -> None:
    A, B = start("kaiming")
    bound = 1 / math.sqrt(IN)
    assert A.abs().max() <= bound
    # 2,048 draws: the standard deviation of a uniform is bound / sqrt(3); within 5%
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not B.any()


def test_gaussian_has_a_standard_deviation_of_one_over_r() -> None:
    A, B = start("gaussian")
    assert A.std().item() == pytest.approx(1 / RANK, rel=0.06)  # 2,048 draws: 1.6% each
    assert A.abs().max() > 3 / RANK  # no uniform would reach there
    assert not B.any()


def test_random_fills_both() -> None:
    A, B = start("random")
    assert A.any()
    assert B.abs().max() <= 1 / math.sqrt(RANK)
    assert B.all()


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "random"])
def test_the_seed_decides(init: str) -> None:
    assert all(map(torch.equal, start(init), start(init)))
    assert not torch.equal(start(init)[0], start(init, seed=1)[0])


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_the_layer_starts_as_its_base_and_only_b_moves_first(init: str) -> None:
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT)
    x = torch.randn(3, IN)
    before = base(x)
    layer = LoRALinear(base, rank=RANK, init=init)
    y = layer(x)
    assert torch.equal(y, before)
    y.square().sum().backward()
    assert layer.lora_B.grad.any()
    assert not layer.lora_A.grad.any()
