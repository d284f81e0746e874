"""The layer in four bits: its numbers, what it saves, the memory that its products keep."""

import copy
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import minilora
from minilora import LoRALinear, NF4Linear
from minilora.methods.dora import DoRALinear
from minilora.methods.lora_bias import LoRABiasLinear
from tests.conftest import logits, tiny_t5
from tests.four_bits import linear, weight
from tests.marks import slow_but

# The layer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
def test_the_layer_is_a_linear_with_the_dequantized_weight(double: bool) -> None:
    layer = NF4Linear(linear(24, 80), double)
    plain = nn.Linear(80, 24)
    plain.weight.data, plain.bias.data = layer.dense_weight(), layer.bias.detach().clone()
    x = weight(2, 5, 80, seed=3, scale=1)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    ys = [layer(xs[0]), plain(xs[1])]
    assert torch.equal(*ys)
    dy = weight(2, 5, 24, seed=4, scale=1)
    for y in ys:
        y.backward(dy)
    assert torch.allclose(xs[0].grad, xs[1].grad, rtol=0, atol=1e-6)  # another order of sums
    assert torch.allclose(layer.bias.grad, plain.bias.grad, rtol=0, atol=1e-6)
    assert not torch.equal(layer.dense_weight(), linear(24, 80).weight)


def test_the_gradient_against_finite_differences_in_float64() -> None:
    layer = NF4Linear(linear(6, 70)).double()
    x = weight(3, 70, scale=1).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [None, LoRALinear, DoRALinear, LoRABiasLinear])
def test_no_dequantized_weight_is_saved_for_backward(
    kind: type[LoRALinear] | None, dtype: torch.dtype, autocast: bool
) -> None:
    layer: nn.Module = NF4Linear(linear(96, 160))
    if kind:
        layer = kind(layer, rank=4, dropout=0.1)
        nn.init.normal_(layer.lora_B)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = weight(5, 160, scale=1).to(dtype).requires_grad_()
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        y = layer(x)
    y.sum().backward()
    assert saved
    floats = [t for t in saved if t.is_floating_point()]
    assert max(t.numel() for t in floats) <= max(5 * 160, 160 * 4)  # x, A or B: never 96 * 160
    codes = [t for t in saved if t.dtype == torch.uint8 and t.numel() == 96 * 160 // 2]
    assert len(codes) == 1 + (kind is DoRALinear)  # which asks its base twice under dropout
    buffer = next(m for n, m in layer.named_buffers() if "codes" in n)
    assert {t.data_ptr() for t in codes} == {buffer.data_ptr()}


def test_one_row_of_input_is_enough() -> None:
    layer, plain = NF4Linear(linear(24, 80)), linear(24, 80)
    plain.weight.data = layer.dense_weight()
    xs = [weight(80, scale=1).requires_grad_() for _ in range(2)]
    for module, x in zip((layer, plain), xs, strict=True):
        module(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.ones(24))
    assert torch.allclose(xs[0].grad, xs[1].grad, rtol=0, atol=1e-6)  # another order of sums


@pytest.mark.parametrize("dtype", slow_but([torch.bfloat16], [torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("wrapped", slow_but([True], [False, True]))
def test_a_compiler_sees_the_same_numbers(dtype: torch.dtype, wrapped: bool) -> None:
    layer: nn.Module = NF4Linear(linear(24, 80)).to(dtype)
    if wrapped:
        layer = LoRALinear(layer, rank=4)
        nn.init.normal_(layer.lora_B)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    xs = [weight(5, 80, scale=1).to(dtype).requires_grad_() for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of what it cannot trace
        ys = [layer(xs[0]), compiled(xs[1])]
    assert torch.equal(*ys)
    for y in ys:
        y.sum().backward()
    assert torch.equal(xs[0].grad, xs[1].grad)
    assert xs[0].grad.any()


def test_nothing_is_saved_where_the_input_needs_no_gradient() -> None:
    layer = NF4Linear(linear(8, 64, bias=False))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        layer(weight(2, 64))
    assert not saved


def test_autocast_decides_the_dtype() -> None:
    layer = NF4Linear(linear(8, 64))
    x = weight(2, 64, scale=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    expected = nn.functional.linear(
        x.bfloat16(), layer.dense_weight(torch.bfloat16), layer.bias.bfloat16()
    )
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.double()(x.double()).dtype == torch.float64  # which it leaves alone


def test_a_cast_moves_the_bias_and_leaves_the_state_alone() -> None:
    layer = NF4Linear(linear(40, 64))
    before = copy.deepcopy(layer.packed)
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    for old, new in zip(before, layer.packed, strict=True):
        assert torch.equal(old, new)
        assert old.dtype == new.dtype


def test_its_weight_tells_shape_and_dtype_without_values() -> None:
    layer = NF4Linear(linear(8, 64).to(torch.bfloat16))
    assert layer.weight.shape == (8, 64)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.is_meta
    assert isinstance(layer, minilora.linears.LinearLike)


def test_t5_looks_at_the_weight_of_a_quantized_layer() -> None:
    model = tiny_t5()
    before = logits(model)
    minilora.quantize(model)
    after = logits(model)
    assert after.isfinite().all()
    assert not torch.equal(after, before)


# The memory that products keep --------------------------------------------------------------------


def test_products_overwrite_each_others_weights_and_nothing_else() -> None:
    torch.manual_seed(0)
    layers = [NF4Linear(nn.Linear(in_, out)) for in_, out in ((64, 192), (128, 32), (64, 16))]
    inputs = [torch.randn(5, layer.in_features, requires_grad=True) for layer in layers]
    outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    for layer, x, y in reversed(list(zip(layers, inputs, outputs, strict=True))):
        weight = layer.dense_weight()
        assert torch.equal(y, F.linear(x, weight, layer.bias))
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient, torch.ones_like(y) @ weight)
        assert gradient.any()
    first, second = layers[0].dense_weight(), layers[0].dense_weight()
    assert first.data_ptr() != second.data_ptr()  # what a caller gets is his


def test_each_thread_has_memory_of_its_own() -> None:
    torch.manual_seed(0)
    layers = [NF4Linear(nn.Linear(256, 256)) for _ in range(4)]
    x = torch.randn(3, 256)
    wanted = [layer(x) for layer in layers]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: layers[i % 4](x), range(200)))
    assert all(torch.equal(found[i], wanted[i % 4]) for i in range(200))


def test_memory_outlives_inference_mode_and_other_default_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("minilora.nf4.tensor._kept", threading.local())  # other tests left some
    layer, x = NF4Linear(nn.Linear(320, 96)), torch.randn(2, 320, requires_grad=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(x.detach())
    with torch.inference_mode(), torch.device("meta"):
        inside = layer(x)
    outside = layer(x)
    assert type(outside) is torch.Tensor
    assert torch.equal(outside, inside)
    outside.sum().backward()
    assert x.grad is not None
    assert x.grad.any()
