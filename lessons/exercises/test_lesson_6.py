"""Lesson 6: checked against the library's NF4 and its codebook."""

import pytest
import torch

from minilora.nf4 import normal_quantiles, pack


@pytest.mark.parametrize("double", [False, True])
def test_the_bits_are_those_of_the_stored_tensors(work, double):
    weights = 64 * 256 * 4
    stored = pack(torch.randn(weights), double)
    held = 8 * sum(tensor.nbytes for tensor in stored if tensor is not None and tensor.dim() > 0)
    assert work.bits(64, 256 if double else None) == pytest.approx(held / weights)
    assert work.bits(32) > work.bits(64)
    assert work.bits(32, 128) == pytest.approx(4 + 8 / 32 + 32 / (32 * 128))


def test_two_codes_share_a_byte(work):
    codes = torch.tensor([0, 15, 15, 0, 7, 8, 1, 2])
    packed = work.pack_pairs(codes)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [0x0F, 0xF0, 0x78, 0x12]
    levels, values = normal_quantiles().float(), torch.randn(1, 64)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(values[0] / values.abs().max(), middles)
    assert torch.equal(work.pack_pairs(codes), pack(values, double=False).codes)


def test_lloyd_beats_the_quantiles_on_a_normal(work):
    values = torch.randn(20_000)
    start = 3.5 * normal_quantiles().float()  # (16,), stretched over the values

    def error(levels):
        return (values[:, None] - levels).square().amin(dim=1).mean().item()

    one, many = (work.best_levels(values, start.clone(), steps) for steps in (1, 30))
    assert error(many) < error(one) < error(start)
    assert error(many) < 0.011  # the least for sixteen levels is 0.0095 (Max 1960)
    lonely = torch.tensor([-1.0, 1.0, 50.0])
    assert work.best_levels(values, lonely, 3)[2] == 50
