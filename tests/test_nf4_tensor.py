"""A tensor in four bits: the codebook, edge cases, bits a value."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import minilora
from minilora import LoRAError
from minilora.nf4.tensor import (
    BLOCK,
    CODEBOOK,
    DYNAMIC,
    MIDPOINTS,
    dynamic_codebook,
    normal_quantiles,
    pack,
    unpack,
)
from tests.conftest import State, tiny_bart
from tests.four_bits import weight

# The codebook -------------------------------------------------------------------------------------


def test_the_codebook_is_the_derived_one_to_single_precision() -> None:
    derived = normal_quantiles()
    assert derived.shape == (16,)
    assert (derived - CODEBOOK.double()).abs().max() < 1.3e-7  # the authors computed in float32
    assert derived[7] == 0
    assert derived[[0, 15]].tolist() == [-1, 1]
    assert (derived.diff() > 0).all()


def test_each_code_is_used_about_equally_often_by_a_normal() -> None:
    # Up to the largest of 64 normals, about 2.4 deviations, where the outermost codes are rarer.
    packed = pack(weight(64, 4096), double=False)
    codes = torch.stack([packed.codes >> 4, packed.codes & 15]).long()
    shares = codes.view(-1).bincount(minlength=16) / codes.numel()
    assert shares.min() > 0.015
    assert shares.max() < 0.11
    entropy = -(shares * shares.log2()).sum()
    assert entropy > 3.8  # of 4 bits


def test_the_scales_code_is_symmetric_but_for_one_and_zero() -> None:
    code = dynamic_codebook()
    assert code.shape == (256,)
    assert (code.diff() > 0).all()
    inner = code[(code != 0) & (code != 1)]
    assert torch.equal(inner, -inner.flip(0))


# Tensors ------------------------------------------------------------------------------------------


def test_the_first_value_is_in_the_high_half_of_a_byte() -> None:
    block = torch.zeros(BLOCK)
    block[0], block[1] = 1.0, -1.0
    assert pack(block, double=False).codes[0] == (15 << 4) | 0
    assert pack(block, double=False).codes[1] == (7 << 4) | 7


def test_ties_go_down() -> None:
    block = torch.zeros(BLOCK)
    block[0] = 1.0  # the scale: the others are on the midpoints exactly
    block[1:16] = torch.tensor(MIDPOINTS)
    values = unpack(pack(block, double=False), (BLOCK,))
    assert torch.equal(values[1:16], CODEBOOK[:15])
    up = torch.nextafter(block[1:16], torch.tensor(2.0))
    block[1:16] = up
    assert torch.equal(unpack(pack(block, double=False), (BLOCK,))[1:16], CODEBOOK[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_zeros_and_so_does_the_absmax(dtype: torch.dtype) -> None:
    matrix = weight(4, 64).to(dtype)
    matrix[:, ::5] = 0
    matrix[2] = 0  # a whole block
    back = unpack(pack(matrix, double=False), (4, 64), dtype)
    assert torch.equal(back[matrix == 0], matrix[matrix == 0])
    largest = matrix.abs().argmax(dim=1, keepdim=True)
    assert torch.equal(back.abs().gather(1, largest), matrix.abs().gather(1, largest))
    assert unpack(pack(torch.zeros(3, 64), double=True), (3, 64)).abs().max() == 0


@pytest.mark.parametrize("magnitude", [1e-38, 3e-39, 1e-45])
def test_subnormals_become_something_finite_and_no_larger(magnitude: float) -> None:
    block = magnitude * torch.linspace(-1, 1, BLOCK)
    for double in (False, True):
        back = unpack(pack(block, double), (BLOCK,))
        assert back.isfinite().all()
        assert back.abs().max() <= 1.1 * magnitude


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 21), (5, 64), (7, 13), (130, 129), (2, 0)])
def test_ragged_sizes(shape: tuple[int, int], double: bool) -> None:
    matrix = weight(*shape)
    packed = pack(matrix, double)
    assert packed.codes.numel() == math.ceil(matrix.numel() / 2)
    assert packed.absmax.numel() == math.ceil(matrix.numel() / BLOCK)
    back = unpack(packed, shape)
    assert back.shape == shape
    if matrix.numel():
        assert (back - matrix).norm() < 0.15 * matrix.norm()
    # A block that is not whole is quantized like a whole one that ends in zeros.
    padded = nn.functional.pad(matrix.view(-1), (0, -matrix.numel() % BLOCK))
    assert torch.equal(pack(padded, double).absmax, packed.absmax)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_refused_by_the_layers_name(value: float) -> None:
    model = tiny_bart()
    model.model.decoder.layers[0].fc2.weight.data[3, 5] = value
    before = State.of(model)
    with pytest.raises(LoRAError, match=r"model\.decoder\.layers\.0\.fc2 holds values .* finite"):
        minilora.quantize(model)
    assert State.of(model).types == before.types
    with pytest.raises(LoRAError, match="not finite"):
        pack(torch.tensor([value, 1.0]))


blocks = st.integers(1, 200).flatmap(
    lambda n: st.lists(
        st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False), min_size=n, max_size=n
    )
)


@given(blocks)
def test_quantizing_what_was_dequantized_changes_nothing(values: list[float]) -> None:
    # Products below float32's smallest normal number, 1e-38, lose bits: that is the limit.
    x = torch.tensor(values)
    x[x.abs() < 1e-30] = 0
    packed = pack(x, double=False)
    again = pack(unpack(packed, tuple(x.shape)), double=False)
    assert torch.equal(again.absmax, packed.absmax)
    assert torch.equal(again.codes, packed.codes)


@given(blocks)
def test_the_error_is_within_the_blocks_bound(values: list[float]) -> None:
    x = torch.tensor(values)
    x[x.abs() < 1e-30] = 0
    absmax = nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK).abs().amax(1)
    bound = absmax.repeat_interleave(BLOCK)[: len(x)]
    # Half the widest gap of the codebook, 0.152, and float32's rounding of a product and a scale.
    single = (unpack(pack(x, double=False), tuple(x.shape)) - x).abs()
    half_gap = CODEBOOK.diff().max() / 2
    assert (single <= (half_gap + 1e-6) * bound).all()
    # With double quantization a scale is off by at most half a gap of its code, 0.0071 (and half
    # a bin of bitsandbytes' table) of the largest deviation among 256 scales.
    spread = (absmax - absmax.mean()).abs().max()
    slack = (DYNAMIC.diff().max() / 2 + 2 / 65535) * spread + 1e-6 * absmax.max()
    double = (unpack(pack(x, double=True), tuple(x.shape)) - x).abs()
    assert (double <= (half_gap + 1e-6) * bound + slack).all()


@pytest.mark.parametrize(("double", "bits"), [(True, 4.127), (False, 4.5)])
def test_bits_a_weight_measured_from_the_tensors(double: bool, bits: float) -> None:
    packed = pack(weight(1024, 1024), double)
    size = sum(tensor.nbytes for tensor in packed if tensor is not None)
    assert 8 * size / 2**20 == pytest.approx(bits, abs=5e-4)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_torch_s_default_dtype_and_device_change_nothing(dtype: str, tmp_path: Path) -> None:
    """Neither when minilora is imported nor when a weight is packed."""
    W = weight(16, 512)
    save_file({"W": W}, tmp_path / "W.safetensors")
    code = (
        "import sys, torch; from pathlib import Path; folder = Path(sys.argv[1]);"
        "from safetensors.torch import load_file, save_file;"
        "W = load_file(folder / 'W.safetensors')['W'];"
        f"torch.set_default_dtype(torch.{dtype}); torch.set_default_device('meta');"
        "from minilora.nf4 import pack, unpack; packed = pack(W);"
        "save_file({'codes': packed.codes, 'W': unpack(packed, tuple(W.shape))}, folder / 'out')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    found, packed = load_file(tmp_path / "out"), pack(W)
    assert torch.equal(found["codes"], packed.codes)
    assert torch.equal(found["W"], unpack(packed, tuple(W.shape)))
