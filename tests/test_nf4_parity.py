"""NF4 against bitsandbytes, bit for bit. `benchmarks/nf4_parity.py` does it for 208 million."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minilora import NF4Linear
from minilora.nf4.tensor import CODEBOOK, DYNAMIC, MIDPOINTS, pack, unpack

bitsandbytes = pytest.importorskip("bitsandbytes")
bnb = bitsandbytes.functional

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(out: int, in_: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """About a model's weights, with heavy tails, ties, zeros and a row of tiny values."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.03 * torch.randn(out, in_, generator=generator)
    weight[::7] *= 30 * torch.rand(weight[::7].shape, generator=generator) ** 8
    ties = torch.tensor([*MIDPOINTS, *CODEBOOK.tolist(), 0.0])
    row = ties[torch.randint(len(ties), (in_,), generator=generator)]
    row[::64] = 1.0
    weight[1], weight[2], weight[3, : in_ // 2] = row, 0.5 * row, 0
    weight[4] *= 1e-6
    return weight.to(dtype)


def theirs(weight: Tensor, double: bool) -> tuple[Tensor, Any]:
    return bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=double)


def same(left: Tensor, right: Tensor) -> bool:
    """Bit for bit: -0 is not 0."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[left.element_size()]
    return torch.equal(left.reshape(-1).view(integer), right.reshape(-1).view(integer))


def test_the_codebooks_are_theirs() -> None:
    assert torch.equal(CODEBOOK, bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(DYNAMIC, bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
# bart-large's, pocket-bart's, one that leaves a scale's block ragged, and a ragged last block
@pytest.mark.parametrize("shape", [(1024, 1024), (4096, 1024), (256, 1024), (40, 192), (7, 26)])
def test_codes_scales_and_values(shape: tuple[int, int], double: bool, dtype: torch.dtype) -> None:
    weight = draw(*shape, dtype)
    packed = pack(weight, double)
    codes, state = theirs(weight, double)
    assert same(packed.codes, codes)
    assert same(packed.absmax, state.absmax)
    if double:
        assert packed.scales is not None
        assert packed.offset is not None
        assert same(packed.scales, state.state2.absmax)
        assert same(packed.offset, state.offset)
    assert same(unpack(packed, shape, dtype), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
def test_forward_and_input_gradient(double: bool, dtype: torch.dtype) -> None:
    linear = nn.Linear(1024, 256, dtype=dtype)
    linear.weight.data = draw(256, 1024, dtype)
    layer = NF4Linear(linear, double)
    codes, state = theirs(linear.weight.data, double)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 1024, generator=generator).to(dtype)
    dy = torch.randn(3, 5, 256, generator=generator).to(dtype)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    bias = linear.bias.detach()
    ys = [layer(xs[0]), bitsandbytes.matmul_4bit(xs[1], codes.t(), state, bias=bias)]
    assert same(ys[0].detach(), ys[1].detach())
    gradients = [torch.autograd.grad(y, leaf, dy)[0] for y, leaf in zip(ys, xs, strict=True)]
    assert same(*gradients)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("in_", [16, 48, 80, 144])
def test_rows_of_16_but_not_64_are_judged_by_float64(
    in_: int, double: bool, dtype: torch.dtype
) -> None:
    """Their AVX-512 code takes the scale of a row's first block for what crosses into the next.

    A block of 64 then spans rows; so the reference is made here: code times scale, in float64.
    """
    weight = draw(64, in_, dtype)
    packed = pack(weight, double)
    codes, state = theirs(weight, double)
    assert same(packed.codes, codes)  # quantizing agrees
    absmax = packed.absmax.double()
    if packed.scales is not None and packed.offset is not None:
        # The product and the sum are float32's, in theirs as in ours: rounded after each.
        assert packed.scales.numel() == 1
        absmax = DYNAMIC.double()[packed.absmax.long()] * packed.scales.double()
        absmax = (absmax.float().double() + packed.offset.double()).float().double()
    nibbles = torch.stack([packed.codes >> 4, packed.codes & 15], dim=1).view(-1).long()
    scales = absmax.repeat_interleave(64)[: weight.numel()]
    exact = (CODEBOOK.double()[nibbles[: weight.numel()]] * scales).view(64, in_)
    ours = unpack(packed, (64, in_), dtype)
    # A float32 product, correctly rounded (the float64 product has room for all of it), and that
    # rounded to the dtype.
    assert torch.equal(ours, exact.float().to(dtype))
    if torch.backends.cpu.get_cpu_capability() == "AVX512" and bitsandbytes.__version__ == "0.50.2":
        wrong = (bnb.dequantize_4bit(codes, state) != ours).double().mean().item()
        assert wrong > 0.05
