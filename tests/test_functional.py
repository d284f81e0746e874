"""The branch against its equation, its gradient against differences, its dropout against theory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minilora.functional import low_rank

SCALE = 7 / 3


def operands(
    *batch: int, out: int = 5, in_: int = 4, rank: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((*batch, out), (*batch, in_), (rank, in_), (out, rank))
    y, x, A, B = (torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes)
    return y, x, A, B


@given(
    st.lists(st.integers(0, 3), max_size=3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)
)
def test_it_is_y_plus_s_times_x_times_the_product_of_b_and_a(
    batch: list[int], out: int, in_: int, rank: int
) -> None:
    y, x, A, B = operands(*batch, out=out, in_=in_, rank=rank)
    expected = y + SCALE * torch.einsum("...i,ri,or->...o", x, A, B)
    result = low_rank(y, x, A, B, SCALE)
    assert result.shape == y.shape
    # float64, sums of at most 9 x 4 products of order 1: 1e-13 leaves room for any order
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)


def test_float32_is_within_the_rounding_of_its_sums() -> None:
    narrow = operands(7, dtype=torch.float32)
    expected = low_rank(*(tensor.double() for tensor in narrow), SCALE)
    # each entry sums 4 and 3 products of order 1: a few units of 6e-8 each
    torch.testing.assert_close(low_rank(*narrow, SCALE).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_gradients_are_those_of_finite_differences() -> None:
    arguments = [tensor.requires_grad_() for tensor in operands(2, 3)]
    assert torch.autograd.gradcheck(lambda *tensors: low_rank(*tensors, SCALE), arguments)


def test_the_gradients_with_dropout_are_those_of_finite_differences() -> None:
    def seeded(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return low_rank(*tensors, SCALE, 0.4)

    arguments = [tensor.requires_grad_() for tensor in operands(2, 3)]
    assert torch.autograd.gradcheck(seeded, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_branch_computes_in_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    y, x, A, B = operands(2, dtype=dtype)
    wide = [tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in (A, B)]
    result = low_rank(y, x, *wide, SCALE)
    assert result.dtype == dtype
    assert torch.equal(result, low_rank(y, x, A, B, SCALE))


def test_dropout_keeps_the_expectation_and_drops_the_right_share() -> None:
    p, rows, in_ = 0.3, 20_000, 4
    x, A, B = torch.ones(rows, in_), torch.eye(in_), torch.eye(in_)
    torch.manual_seed(0)
    branch = low_rank(torch.zeros(rows, in_), x, A, B, 1.0, p)  # the dropped x itself
    assert set(branch.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    # 80,000 draws: standard deviations 0.0016 and 0.0023, four of them
    assert (branch == 0).float().mean().item() == pytest.approx(p, abs=0.0065)
    assert branch.mean().item() == pytest.approx(1, abs=0.0093)


def test_dropout_spares_y_and_repeats_with_the_seed() -> None:
    y, x, A, B = operands(4, 8)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return low_rank(y, x, A, B, SCALE, 0.5)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert torch.equal(low_rank(y, x, A, torch.zeros_like(B), SCALE, 0.5), y)


def test_without_dropout_no_random_number_is_drawn_and_no_argument_is_changed() -> None:
    arguments = operands(4)
    before, state = [tensor.clone() for tensor in arguments], torch.get_rng_state()
    low_rank(*arguments, SCALE)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, arguments, before))
