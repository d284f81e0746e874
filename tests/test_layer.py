"""LoRALinear: the equation, exact merging in every dtype, and states that cannot be confused."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minilora import LoRAError, LoRALinear, linears
from tests.conftest import ALPHA, RANK, equal, randomize_adapter, weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALVES = [torch.bfloat16, torch.float16]
OUT, IN = 12, 20
KINDS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": lambda out, in_: nn.Linear(in_, out),
    "conv1d": lambda out, in_: Conv1D(out, in_),
}


def make(
    kind: str = "linear",
    dtype: torch.dtype = torch.float32,
    out: int = OUT,
    in_: int = IN,
    rank: int = RANK,
    dropout: float = 0.0,
    seed: int = 0,
) -> LoRALinear:
    torch.manual_seed(seed)
    base = KINDS[kind](out, in_).eval()
    with torch.no_grad():
        base.weight.normal_()
        base.bias.normal_()
    layer = LoRALinear(base.to(dtype), rank=rank, alpha=ALPHA, dropout=dropout)
    randomize_adapter(layer, seed)
    return layer


def weight_of(layer: LoRALinear) -> Tensor:
    """W (out, in), a copy."""
    return linears.dense_weight(layer.base).clone()


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of a dtype around float64 values: one ulp."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values).exponent - 1  # |value| in [2^exponent, 2^(exponent + 1))
    return torch.ldexp(torch.full_like(values, info.eps), exponent).clamp_min(
        info.smallest_normal * info.eps
    )


def test_the_spacing_is_that_of_the_dtype() -> None:
    for dtype in DTYPES[:-1]:
        values = torch.tensor([1.0, 1.5, 3.0, 0.7, 1024.0, 1e-7]).to(dtype)
        above = torch.nextafter(values, torch.full_like(values, torch.inf))
        assert torch.equal(spacing(values.double(), dtype), above.double() - values.double())


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_the_base_plus_the_scaled_branch(kind: str) -> None:
    layer, x = make(kind, torch.float64), torch.randn(2, 5, IN, dtype=torch.float64)
    A, B, W = layer.lora_A, layer.lora_B, weight_of(layer)
    expected = x @ W.T + layer.base.bias + ALPHA / RANK * ((x @ A.T) @ B.T)
    # float64 sums of 20 and 3 products in another order
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(layer(x), layer.base(x))
    assert layer.scale == ALPHA / RANK
    assert torch.equal(layer.delta(), (B @ A) * layer.scale)
    assert layer.delta().shape == (OUT, IN)


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    assert LoRALinear(nn.Linear(8, 8), rank=4, alpha=6, rslora=True).scale == 3.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_a_and_b_train_and_stay_wide(dtype: torch.dtype) -> None:
    layer = make(dtype=dtype)
    trains = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trains == {"lora_A", "lora_B"}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.delta().dtype == wide
    assert layer(torch.randn(2, IN, dtype=dtype)).dtype == dtype


def test_the_gradients_are_those_of_the_dense_weight_projected() -> None:
    layer, x = make(dtype=torch.float64), torch.randn(7, IN, dtype=torch.float64)
    layer(x).square().sum().backward()
    W = (weight_of(layer) + layer.delta()).requires_grad_()
    nn.functional.linear(x, W, layer.base.bias).square().sum().backward()
    A, B, s = layer.lora_A, layer.lora_B, layer.scale
    torch.testing.assert_close(A.grad, s * B.detach().T @ W.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(B.grad, s * W.grad @ A.detach().T, rtol=1e-11, atol=1e-11)
    assert layer.base.weight.grad is None
    assert layer.base.bias.grad is None


SIZES = st.integers(1, 40)


@given(st.sampled_from(list(KINDS)), st.sampled_from(DTYPES), SIZES, SIZES, st.integers(1, 6))
@example("linear", torch.bfloat16, 512, 256, 8)  # big enough for the rare roundings
@example("linear", torch.float16, 512, 256, 8)
def test_merging_sums_in_float32_and_rounds_once(
    kind: str, dtype: torch.dtype, out: int, in_: int, rank: int
) -> None:
    layer = make(kind, dtype, out, in_, rank)
    W, s, A, B = weight_of(layer), layer.scale, layer.lora_A.detach(), layer.lora_B.detach()
    storage = layer.base.weight.data_ptr()
    layer.merge()
    merged = weight_of(layer)
    assert layer.base.weight.data_ptr() == storage
    assert not torch.equal(merged, W)
    wide = W.double() if dtype == torch.float64 else W.float()
    assert torch.equal(merged, (wide + (B @ A) * s).to(dtype))
    if dtype in HALVES:
        # Half an ulp for the one rounding, and what float32 may be off: r products, r - 1 sums,
        # the scale, its product and the last sum, each by 2^-24 of the sum of absolute values.
        size = W.double().abs() + s * B.double().abs() @ A.double().abs()
        exact = W.double() + s * B.double() @ A.double()
        off = (2 * rank + 2) * 2.0**-24 * size
        bound = spacing(exact.abs() + off, dtype) / 2 + off
        assert ((merged.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("cycles", [1, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_unmerging_restores_every_bit(kind: str, dtype: torch.dtype, cycles: int) -> None:
    layer = make(kind, dtype)
    with torch.no_grad():
        layer.base.weight.view(-1)[:3] = torch.tensor([-0.0, torch.inf, torch.nan])
    before = layer.base.weight.detach().clone()
    bits = before.view(torch.uint8).clone()  # torch.equal would take -0 for 0 and refuse NaN
    for cycle in range(cycles):
        randomize_adapter(layer, seed=cycle)
        layer.merge()
        assert not torch.equal(layer.base.weight.view(torch.uint8), bits)
        layer.unmerge()
    assert torch.equal(layer.base.weight.view(torch.uint8), bits)


def test_merging_or_unmerging_twice_changes_nothing() -> None:
    layer = make()
    before = weights(layer)
    layer.unmerge()
    assert equal(weights(layer), before)
    layer.merge()
    once = weights(layer)
    layer.merge()
    assert equal(weights(layer), once)
    assert layer.merged
    layer.unmerge()
    layer.unmerge()
    assert equal(weights(layer), before)
    assert not layer.merged


def test_a_merged_layer_is_its_base_and_computes_what_the_branch_did() -> None:
    layer, x = make(), torch.randn(4, IN)
    active = layer(x)
    layer.merge()
    assert torch.equal(layer(x), layer.base(x))
    # float32 sums of 20 products of order 1, in another order
    torch.testing.assert_close(layer(x), active, rtol=1e-4, atol=1e-4)


def test_whoever_shares_the_storage_hears_the_merged_weight() -> None:
    layer, x = make(), torch.randn(4, IN)
    consumer = nn.Linear(IN, OUT)
    consumer.weight, consumer.bias = layer.base.weight, layer.base.bias
    view = layer.base.weight.detach()
    layer.merge()
    assert torch.equal(consumer(x), layer(x))
    layer.unmerge()
    assert torch.equal(consumer(x), layer.base(x))
    assert view.data_ptr() == layer.base.weight.data_ptr()


def test_training_while_merged_is_refused_and_inference_is_not() -> None:
    layer, x = make(dropout=0.5), torch.randn(4, IN)
    layer.merge()
    expected = layer.base(x)
    assert torch.equal(layer.eval()(x), expected)
    layer.train()
    with pytest.raises(LoRAError, match="cannot train while merged"):
        layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    layer.unmerge()
    assert layer(x).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_too_large_for_float16_is_refused_and_nothing_changed(kind: str) -> None:
    layer = make(kind, torch.float16)
    with torch.no_grad():
        layer.lora_B[3, 1] = 1e6
    before = weights(layer)
    with pytest.raises(LoRAError, match=r"does not fit torch.float16.*wider dtype"):
        layer.merge()
    assert equal(weights(layer), before)
    assert not layer.merged


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_holds_the_original_weight_whether_merged_or_not(kind: str) -> None:
    layer = make(kind)
    plain = copy.deepcopy(layer.state_dict())
    layer.merge()
    merged = layer.state_dict()
    assert list(merged) == list(plain) == ["lora_A", "lora_B", "base.weight", "base.bias"]
    assert equal(merged, plain)
    assert all(tensor.is_contiguous() for tensor in merged.values())  # safetensors wants that


def test_loading_while_merged_is_refused_and_nothing_changed() -> None:
    layer = make()
    other = make(seed=5).state_dict()
    layer.merge()
    before = weights(layer)
    with pytest.raises(LoRAError, match="cannot load weights while merged"):
        layer.load_state_dict(other)
    assert equal(weights(layer), before)
    layer.unmerge()
    layer.load_state_dict(other)
    assert equal(layer.state_dict(), other)
    layer.merge()
    assert equal(layer.state_dict(), other)


def through_pickle(layer: LoRALinear) -> LoRALinear:
    return pickle.loads(pickle.dumps(layer))


def through_torch(layer: LoRALinear) -> LoRALinear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_merged_layer_is_merged_and_unmerges_by_itself(
    kind: str, copied: Callable[[LoRALinear], LoRALinear]
) -> None:
    layer = make(kind)
    before = weights(layer)
    layer.merge()
    merged = weights(layer)
    twin = copied(layer)
    assert twin.merged
    assert equal(weights(twin), merged)
    with pytest.raises(LoRAError, match="cannot load weights while merged"):
        twin.load_state_dict(layer.state_dict())
    twin.unmerge()
    assert equal(weights(twin), before)
    assert equal(weights(layer), merged)
    assert equal(layer.state_dict(), twin.state_dict())


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16, torch.float16])
def test_a_merged_layer_moved_to_another_dtype_unmerges_to_what_its_base_would_be(
    to: torch.dtype,
) -> None:
    layer = make()
    expected = copy.deepcopy(layer.base).to(to).weight
    layer.merge()
    layer.to(to)
    layer.unmerge()
    assert torch.equal(layer.base.weight, expected)
    assert layer(torch.randn(2, IN, dtype=to)).dtype == to


def test_the_original_weight_moves_with_the_layer() -> None:
    layer = make()
    layer.merge()
    assert layer.bfloat16().original_weight.dtype == torch.bfloat16
    assert layer.to("meta").original_weight.is_meta


@pytest.mark.parametrize("dtype", HALVES)
def test_a_halved_adapter_still_merges_by_a_float32_sum(dtype: torch.dtype) -> None:
    layer = make().to(dtype)
    W, A, B = weight_of(layer), layer.lora_A.detach(), layer.lora_B.detach()
    assert layer.delta().dtype == torch.float32
    layer.merge()
    expected = (W.float() + (B.float() @ A.float()) * layer.scale).to(dtype)
    assert torch.equal(layer.base.weight, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merged_layer_moved_to_a_device_and_back_unmerges_exactly(dtype: torch.dtype) -> None:
    layer = make(dtype=dtype)
    before = weights(layer)
    layer.merge()
    layer.cuda().unmerge()
    assert equal(weights(layer.cpu()), before)
    layer.cuda().merge()
    layer.cpu().unmerge()
    assert equal(weights(layer), before)


def test_autocast_and_inference_mode_leave_merging_exact() -> None:
    layer = make()
    before = weights(layer)
    layer.merge()
    merged = weights(layer)
    layer.unmerge()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        layer.merge()
    assert equal(weights(layer), merged)
    layer.unmerge()
    assert equal(weights(layer), before)
    layer.train()(torch.randn(2, IN)).sum().backward()
    assert layer.lora_A.grad is not None


def test_dropout_acts_in_training_only_and_repeats_with_the_seed() -> None:
    layer, x = make(dropout=0.5), torch.randn(4, IN)
    plain = make(dropout=0.0)(x)
    assert torch.equal(layer.eval()(x), plain)

    def train(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer.train()(x)

    assert not torch.equal(train(0), plain)
    assert torch.equal(train(0), train(0))
    assert not torch.equal(train(0), train(1))


def test_the_layer_shows_what_models_ask_of_a_linear() -> None:
    for kind in KINDS:
        layer = make(kind)
        assert layer.weight is layer.base.weight
        assert layer.bias is layer.base.bias
        assert (layer.out_features, layer.in_features) == (OUT, IN)
        assert not layer.training  # as the base
    assert LoRALinear(nn.Linear(4, 4, bias=False), rank=1).bias is None
    assert "rank=3" in repr(layer)
    assert "merged" not in repr(layer)
    layer.merge()
    assert "merged" in repr(layer)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("rank", value) for value in (0, 2.5, True)),
        *(("alpha", value) for value in (0, -1, torch.nan)),
        *(("dropout", value) for value in (1.0, -0.1)),
    ],
)
def test_wrong_numbers_are_refused_and_the_base_left_alone(argument: str, value: object) -> None:
    base = nn.Linear(4, 4)
    with pytest.raises(LoRAError, match=argument):
        LoRALinear(base, **{argument: value})
    assert base.weight.requires_grad
