"""NF4 by itself: the codebook, edge cases, the layer, whole models, the way back, LoftQ."""

import copy
import json
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import minilora
from minilora import LoRAConfig, LoRAError, LoRALinear, NF4Linear
from minilora.biased import BiasedLoRALinear
from minilora.dora import DoRALinear
from minilora.nf4 import (
    BLOCK,
    CODEBOOK,
    DYNAMIC,
    MIDPOINTS,
    dynamic_codebook,
    normal_quantiles,
    pack,
    unpack,
)
from minilora.quantize import loftq
from tests.conftest import State, inputs, logits, randomize_adapter, tiny_bart, tiny_t5

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


# The codebook -------------------------------------------------------------------------------------


def test_the_codebook_is_the_derived_one_to_single_precision() -> None:
    derived = normal_quantiles()
    assert derived.shape == (16,)
    assert (derived - CODEBOOK.double()).abs().max() < 1.3e-7  # the authors computed in float32
    assert derived[7] == 0
    assert (derived[0], derived[15]) == (-1, 1)
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
@pytest.mark.parametrize("kind", [None, LoRALinear, DoRALinear, BiasedLoRALinear])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrapped", [False, True])
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
    assert isinstance(layer, minilora.bases.Base)


def test_t5_looks_at_the_weight_of_a_quantized_layer() -> None:
    model = tiny_t5()
    before = logits(model)
    minilora.quantize(model)
    after = logits(model)
    assert after.isfinite().all()
    assert not torch.equal(after, before)


# Models -------------------------------------------------------------------------------------------


def test_a_model_is_quantized_but_for_head_embeddings_and_norms() -> None:
    model = tiny_bart(d_model=32)
    before = logits(model)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    report = minilora.quantize(model)
    assert list(report.modules) == linears
    assert isinstance(model.lm_head, nn.Linear)
    assert model.lm_head.weight is model.model.shared.weight
    assert f"{len(linears)} linears in 4 bits" in str(report)
    assert report.before == 4 * report.weights
    state = {k: v for k, v in model.state_dict().items() if k.endswith(("codes", "absmax"))}
    assert report.after > sum(t.nbytes for t in state.values())  # scales and offsets too
    difference = (logits(model) - before).norm() / before.norm()
    assert 0 < difference < 1  # a model of random weights as large as these is a sensitive one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("q_prj",)}, "'q_prj': nothing matches"),
        ({"targets": ("shared",)}, "model.shared is a .*Embedding"),
        ({"targets": ("lm_head",), "exclude": ()}, "lm_head shares its weight with .*shared"),
        ({"targets": ("q_proj",), "exclude": ("q_proj",)}, "no torch.nn.Linear"),
    ],
)
def test_what_cannot_be_quantized_is_named(options: dict[str, object], message: str) -> None:
    model = tiny_bart()
    before = State.of(model)
    with pytest.raises(LoRAError, match=message):
        minilora.quantize(model, **options)
    before.check(model)


def test_what_does_not_fit_float32_is_named_and_nothing_is_changed() -> None:
    model = nn.Sequential(nn.Linear(64, 2), nn.Linear(2, 64)).double()
    model[1].weight.data[3, 1] = 1e39
    with pytest.raises(LoRAError, match=r"quantize: 1 holds values .* not finite in float32"):
        minilora.quantize(model)
    assert all(type(layer) is nn.Linear for layer in model)
    model[1].weight.data = torch.zeros(64, 2, dtype=torch.float8_e4m3fn)
    with pytest.raises(LoRAError, match=r"quantize: 1 is quantized already.*float8"):
        minilora.quantize(model)


def test_a_compiled_model_is_quantized_under_its_own_names() -> None:
    inner = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 64))
    report = minilora.quantize(torch.compile(inner, backend="eager"))
    assert report.modules == ("0", "1")
    assert all(isinstance(layer, NF4Linear) for layer in inner)


def test_a_module_in_four_bits_cannot_train_whole(tmp_path: Path) -> None:
    names = {"q_proj": nn.Linear(64, 64), "head": nn.Sequential(nn.Linear(64, 2))}
    config = LoRAConfig(rank=2, targets=("q_proj",), also_train=("head",))
    model = nn.ModuleDict(copy.deepcopy(names))
    minilora.quantize(model)
    before = State.of(model)
    with pytest.raises(LoRAError, match=r"also_train: head\.0 is a NF4Linear.*by exclude"):
        minilora.inject(model, config)
    before.check(model)
    apart = nn.ModuleDict(copy.deepcopy(names))
    minilora.quantize(apart, exclude=("head.0",))
    minilora.inject(apart, config)
    minilora.save_adapter(apart, tmp_path)
    with pytest.raises(LoRAError, match=r"also_train: head\.0 is a NF4Linear"):
        minilora.load_adapter(model, tmp_path)
    before.check(model)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_an_empty_linear_is_no_error() -> None:
    assert "1 linears in 4 bits: 0.0 MB" in str(minilora.quantize(nn.Sequential(nn.Linear(0, 3))))


def test_it_is_quantized_before_it_is_injected_and_once() -> None:
    model = tiny_bart()
    minilora.inject(model, LoRAConfig(rank=2, targets=("q_proj",)))
    with pytest.raises(LoRAError, match="before inject"):
        minilora.quantize(model)
    model = quantized_bart()
    with pytest.raises(LoRAError, match=r"no torch\.nn\.Linear"):
        minilora.quantize(model)


def test_attention_that_bypasses_its_linears_is_left_alone() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    minilora.quantize(layer)
    assert isinstance(layer.linear1, NF4Linear)
    assert not isinstance(layer.self_attn.out_proj, NF4Linear)
    with torch.no_grad():
        assert layer(weight(2, 3, 16, scale=1)).isfinite().all()
    with pytest.raises(LoRAError, match="only plain linears"):
        minilora.quantize(nn.MultiheadAttention(16, 2), targets=("out_proj",))


@pytest.mark.parametrize("double", [False, True])
def test_a_quantized_model_is_saved_and_loaded(tmp_path: Path, double: bool) -> None:
    model = quantized_bart(double=double)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_model(model, str(path))
    other = tiny_bart(seed=5, d_model=32)
    minilora.quantize(other, double=double)
    assert not torch.equal(logits(other), logits(model))
    safetensors.torch.load_model(other, str(path))
    assert torch.equal(logits(other), logits(model))
    with torch.device("meta"):
        empty = type(model)(model.config)
    minilora.quantize(empty, double=double)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty.eval()(**inputs(model)).logits, model(**inputs(model)).logits)
    wrong = tiny_bart(d_model=32)
    minilora.quantize(wrong, double=not double)
    with pytest.raises(RuntimeError):
        wrong.load_state_dict(state)


# QLoRA --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"dora": True}, {"lora_bias": True}, {"dropout": 0.1}])
def test_only_the_adapter_of_a_quantized_model_trains(changes: dict[str, object]) -> None:
    model = quantized_bart()
    size = sum(p.numel() for p in tiny_bart(d_model=32).parameters())
    report = minilora.inject(model, LoRAConfig(rank=3, alpha=7, targets=MIXED, **changes))
    assert report.total == size + report.trainable
    model.train()
    model(**inputs(model)).logits.square().mean().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    # With B zero A gets a gradient of zero; B does not.
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def test_merging_into_four_bits_is_refused_with_the_reason() -> None:
    model = quantized_bart()
    minilora.inject(model, LoRAConfig(rank=2, targets=MIXED))
    randomize_adapter(model)
    before, output = State.of(model), logits(model)
    for call in (minilora.merge, minilora.unwrap):
        with pytest.raises(LoRAError, match=r"quantized.*swallow.*dequantize=True"):
            call(model)
    before.check(model)
    assert torch.equal(logits(model), output)


@pytest.mark.parametrize("changes", [{}, {"dora": True}, {"lora_bias": True}])
def test_unwrap_dequantizes_into_plain_linears(
    changes: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    model = quantized_bart(exclude=("lm_head", "fc1"))  # fc1 is adapted, but not in four bits
    minilora.inject(model, LoRAConfig(rank=2, alpha=7, targets=MIXED, **changes))
    randomize_adapter(model)
    output, base = logits(model), logits(quantized_bart(exclude=("lm_head", "fc1")))
    plain = minilora.unwrap(model, dequantize=True)
    assert not [m for m in plain.modules() if isinstance(m, NF4Linear | LoRALinear)]
    assert plain.state_dict().keys() == tiny_bart(d_model=32).state_dict().keys()
    # The branch and the sum of the weights round differently; the adapter itself does far more.
    assert torch.allclose(logits(plain), output, rtol=0, atol=1e-4 * output.abs().max().item())
    assert (output - base).abs().max() > 0.01 * output.abs().max()
    assert "rounding error at most 0 an entry" in capsys.readouterr().out


def test_unwrap_into_bf16_reports_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    model = quantized_bart()
    minilora.inject(model, LoRAConfig(rank=2, alpha=7, targets=MIXED))
    randomize_adapter(model)
    exact = minilora.unwrap(copy.deepcopy(model), dequantize=True)
    capsys.readouterr()
    minilora.unwrap(model, dequantize=True, dtype=torch.bfloat16)
    pairs = [
        (m.weight, dict(exact.named_modules())[name].weight)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name != "lm_head"
    ]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}  # so that it runs
    assert logits(model).isfinite().all()
    assert all(torch.equal(rounded, whole.bfloat16()) for rounded, whole in pairs)  # once
    largest = max((r.float() - w).abs().max().item() for r, w in pairs)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{len(pairs)} linears dequantized to torch.bfloat16")
    assert f"rounding error at most {largest:.2g} an entry" in printed
    assert largest > 0
    with pytest.raises(LoRAError, match="float32 or bfloat16"):
        minilora.unwrap(quantized_bart(), dequantize=True, dtype=torch.float16)


@pytest.mark.parametrize("before", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_unwrap_gives_a_model_that_runs_in_its_own_dtype(
    dtype: torch.dtype, before: torch.dtype
) -> None:
    model = tiny_bart(d_model=32).to(before)
    minilora.quantize(model)
    model.to(dtype)
    minilora.inject(model, LoRAConfig(rank=2, alpha=7, targets=MIXED))
    randomize_adapter(model)
    output = logits(model)
    minilora.unwrap(model, dequantize=True)
    assert {p.dtype for p in model.parameters()} == {dtype}
    # Rounding W + s B A once in place of each product: eps of the dtype, over some layers.
    tolerance = 30 * max(torch.finfo(dtype).eps, 1e-6) * output.abs().max().item()
    assert torch.allclose(logits(model), output, rtol=0, atol=tolerance)


def test_what_does_not_fit_the_dtype_leaves_the_model_as_it_was() -> None:
    model = tiny_bart(d_model=32).half()
    minilora.quantize(model)
    minilora.inject(model, LoRAConfig(rank=2, targets=MIXED))
    with torch.no_grad():
        for layer in (model.model.decoder.layers[0].fc1, model.model.encoder.layers[0].fc1):
            layer.lora_B[:], layer.lora_A[:] = 1e3, 1e3
    before = State.of(model)
    with pytest.raises(LoRAError, match=r"does not fit torch\.float16: say dtype"):
        minilora.unwrap(model, dequantize=True)
    before.check(model)
    minilora.unwrap(model, dequantize=True, dtype=torch.float32)
    assert model.model.decoder.layers[0].fc1.weight.max() > 1e6


def test_a_failed_unwrap_leaves_the_model_as_it_was() -> None:
    model = quantized_bart()
    minilora.inject(model, LoRAConfig(rank=2, targets=MIXED))
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.lora_B[:] = math.inf
    before = State.of(model)
    with pytest.raises(LoRAError, match=r"decoder\.layers\.0\.fc1"):
        minilora.unwrap(model, dequantize=True)
    before.check(model)


def test_adapters_of_a_quantized_model_are_saved_and_loaded(tmp_path: Path) -> None:
    model = quantized_bart()
    minilora.inject(model, LoRAConfig(rank=2, alpha=7, targets=MIXED))
    randomize_adapter(model)
    minilora.save_adapter(model, tmp_path)
    other = quantized_bart()
    minilora.load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    with minilora.disabled(other):
        assert torch.equal(logits(other), logits(quantized_bart()))


# LoftQ --------------------------------------------------------------------------------------------


def test_loftq_starts_with_what_quantization_rounded_away() -> None:
    base, scale = linear(48, 80), 7 / 3  # no power of two
    A, B = torch.empty(3, 80), torch.empty(48, 3)
    quantized = loftq(base, A, B, scale)
    assert torch.equal(quantized.codes, NF4Linear(base).codes)
    residual = (base.weight - quantized.dense_weight()).double()
    U, S, Vh = torch.linalg.svd(residual)
    best = U[:, :3] * S[:3] @ Vh[:3]
    assert torch.allclose((scale * B @ A).double(), best, rtol=0, atol=1e-6)  # float32's SVD
    assert torch.allclose(A.norm(dim=1), B.norm(dim=0))  # the singular values are shared evenly


def test_loftq_above_the_smaller_side_only_costs() -> None:
    base = linear(3, 64)
    layer = LoRALinear(base, rank=8, alpha=8, init="loftq")
    lost = base.weight - layer.base.dense_weight()
    assert torch.allclose(layer.delta(), lost, rtol=0, atol=1e-6)  # all of it: rank 3
    assert not layer.lora_B[:, 3:].any()
    assert layer.lora_A[3:].any()


def test_loftq_leaves_an_adapter_that_learns_where_nothing_was_lost() -> None:
    base = nn.Linear(64, 48)
    base.weight.data.zero_()  # exact in four bits
    layer = LoRALinear(base, rank=2, init="loftq")
    assert not layer.lora_B.any()
    layer(torch.ones(1, 64)).sum().backward()
    assert layer.lora_B.grad.abs().min() > 0  # were A zero too, it would be as well
    base.weight.data[5] = weight(64)  # now one direction is lost, but no second
    layer = LoRALinear(base, rank=4, init="loftq")
    assert (layer.lora_B.norm(dim=0) > 0).tolist() == [True, False, False, False]
    assert (layer.lora_A.norm(dim=1)[1:] > 0.3).all()  # as Kaiming made them


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_an_empty_linear_comes_back_too(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(0, 3))
    minilora.quantize(model)
    minilora.unwrap(model, dequantize=True)
    assert capsys.readouterr().out.startswith("2 linears dequantized to torch.float32")
    minilora.unwrap(model, dequantize=True)
    assert capsys.readouterr().out == "no linears in 4 bits\n"


def test_more_steps_of_loftq_come_nearer_to_the_weight() -> None:
    base = linear(64, 96)
    errors = []
    for steps in (1, 5):
        A, B = torch.empty(8, 96), torch.empty(64, 8)
        quantized = loftq(base, A, B, 0.5, steps)
        errors.append((base.weight - quantized.dense_weight() - 0.5 * B @ A).norm())
    plain = (base.weight - NF4Linear(base).dense_weight()).norm()
    assert errors[1] < errors[0] < 0.9 * plain


def test_loftq_brings_the_model_nearer_to_what_it_was() -> None:
    target = tiny_bart(d_model=32)
    distances = {}
    for init in ("kaiming", "loftq"):
        model = tiny_bart(d_model=32)
        apart = MIXED if init == "loftq" else ()
        minilora.quantize(model, exclude=("lm_head", *apart))
        minilora.inject(model, LoRAConfig(rank=8, targets=MIXED, init=init))
        assert len([m for m in model.modules() if isinstance(m, NF4Linear)]) == 22
        distances[init] = (logits(model) - logits(target)).norm().item()
        with minilora.disabled(model):  # the base is the same, whichever way
            assert torch.equal(logits(model), logits(quantized_bart()))
    assert distances["loftq"] < distances["kaiming"]


def test_loftq_wants_the_whole_weight_and_says_so() -> None:
    model = quantized_bart()
    before = State.of(model)
    with pytest.raises(LoRAError, match=r"v_proj is a NF4Linear: only plain linears can be"):
        minilora.inject(model, LoRAConfig(rank=2, targets=MIXED, init="loftq"))
    before.check(model)


def test_an_adapter_that_loftq_started_says_that_its_base_is_another(tmp_path: Path) -> None:
    model = tiny_bart(d_model=32)
    minilora.quantize(model, exclude=("lm_head", *MIXED))
    minilora.inject(model, LoRAConfig(rank=2, alpha=7, targets=MIXED, init="loftq"))
    minilora.save_adapter(model, tmp_path)
    entries = json.loads((tmp_path / "adapter_config.json").read_text())
    assert entries["init_lora_weights"] == "loftq"  # PEFT makes the 4-bit base again by it
    assert entries["loftq_config"] == {"loftq_bits": 4, "loftq_iter": 1}
    other = tiny_bart(d_model=32)
    with pytest.raises(LoRAError, match=r"q_proj must be in 4 bits.*LoftQ"):
        minilora.load_adapter(other, tmp_path)
    minilora.quantize(other)
    minilora.load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    assert minilora.config_of(other).init == "loftq"
    entries["loftq_config"]["loftq_iter"] = 5
    (tmp_path / "adapter_config.json").write_text(json.dumps(entries))
    with pytest.raises(LoRAError, match="loftq_config must be"):
        minilora.read_adapter(tmp_path)


def test_peft_reads_the_file_and_means_the_same_by_loftq(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    from peft.utils.loftq_utils import _low_rank_decomposition

    model = tiny_bart(d_model=32)
    minilora.quantize(model, exclude=("lm_head", *MIXED))
    # PEFT leaves the scale out of the start: it means what minilora means at s = 1 only.
    minilora.inject(model, LoRAConfig(rank=3, alpha=3, targets=MIXED, init="loftq"))
    minilora.save_adapter(model, tmp_path)
    # PEFT asks whether scipy is installed, which its start in four bits does not use.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    monkeypatch.undo()
    assert config.init_lora_weights == "loftq"
    assert (config.loftq_config["loftq_bits"], config.loftq_config["loftq_iter"]) == (4, 1)
    # One step, as their `loftq_init` does it (which wants CUDA): quantize, then the residual's SVD.
    layer = model.model.encoder.layers[0].fc1
    weight = tiny_bart(d_model=32).model.encoder.layers[0].fc1.weight.detach()
    parts = _low_rank_decomposition(weight - layer.base.dense_weight(), reduced_rank=3)
    assert torch.allclose(layer.delta(), parts["L"] @ parts["R"], rtol=0, atol=1e-5)
    assert layer.delta().abs().max() > 1e-3


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


def test_memory_outlives_inference_mode_and_other_default_devices() -> None:
    layer, x = NF4Linear(nn.Linear(320, 96)), torch.randn(2, 320, requires_grad=True)
    with torch.inference_mode(), torch.device("meta"):
        inside = layer(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(x.detach())
    outside = layer(x)
    assert type(outside) is torch.Tensor
    assert torch.equal(outside, inside)
    outside.sum().backward()
    assert x.grad is not None
    assert x.grad.any()
