"""DoRALinear: the equation, the norm without B A, its constant in the gradient, exact merging."""

import copy
import json
import math
import pickle
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import minilora
from minilora import LoRAError, linears
from minilora.methods.dora import DoRALinear
from minilora.methods.lora_bias import LoRABiasLinear
from tests.conftest import ALPHA, RANK, State, adapted, logits, tiny_bart

OUT, IN = 12, 20
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make(
    kind: str = "linear",
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    bias: bool = True,
    seed: int = 0,
    rank: int = RANK,
) -> DoRALinear:
    torch.manual_seed(seed)
    base = nn.Linear(IN, OUT, bias=bias) if kind == "linear" else Conv1D(OUT, IN)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_()
    layer = DoRALinear(base.to(dtype).eval(), rank=rank, alpha=ALPHA, dropout=dropout)
    with torch.no_grad():
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.normal_(std=0.5)
        layer.magnitude *= 1 + 0.5 * torch.rand_like(layer.magnitude)
    return layer


def direction(layer: DoRALinear) -> Tensor:
    """W + s B A in float64."""
    A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    return linears.dense_weight(layer.base).double() + ALPHA / layer.rank * B @ A


def reference(layer: DoRALinear, x: Tensor) -> Tensor:
    """Equation 5 in float64."""
    v = direction(layer)
    weight = layer.magnitude.detach().double()[:, None] * v / v.norm(dim=1, keepdim=True)
    bias = None if layer.bias is None else layer.bias.detach().double()
    return nn.functional.linear(x.double(), weight, bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_the_equation(kind: str, dtype: torch.dtype, bias: bool) -> None:
    layer = make(kind, dtype, bias=bias)
    x = torch.randn(2, 5, IN).to(dtype)
    y, expected = layer(x), reference(layer, x)
    assert y.dtype == dtype
    # units in the last place: 3.6 occur, and in bf16 the base alone is 41 or more away
    tolerance = 8 * torch.finfo(dtype).eps * expected.abs().max().item()
    assert (y.double() - expected).abs().max() <= tolerance
    assert (layer.base(x).double() - expected).abs().max() > 0.5


def test_autocast_computes_in_its_dtype_and_the_norm_in_float32() -> None:
    layer = make()
    x = torch.randn(4, IN)
    expected, exact = reference(layer, x), layer.norm()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert layer.norm().dtype == torch.float32
        assert torch.equal(layer.norm(), exact)
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).abs().max() < 0.03 * expected.abs().max()
    y.float().sum().backward()
    assert layer.magnitude.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", [DoRALinear, LoRABiasLinear])
def test_it_compiles_without_a_graph_break(kind: type[minilora.LoRALinear]) -> None:
    layer = kind(nn.Linear(IN, OUT), RANK, ALPHA, init="random").eval()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(3, IN)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "random"])
def test_it_starts_as_lora_does(init: str) -> None:
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(IN, OUT), RANK, ALPHA, init=init)
    assert torch.allclose(layer.magnitude.double(), direction(layer).norm(dim=1))
    x = torch.randn(4, IN)
    plain = minilora.LoRALinear(layer.base, RANK, ALPHA)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "magnitude"})
    assert torch.allclose(layer(x), plain(x), atol=1e-5)


@given(
    out=st.integers(1, 30),
    in_=st.integers(1, 30),
    rank=st.integers(1, 8),
    size=st.floats(-3, 3),
    seed=st.integers(0, 9),
)
def test_the_norm_is_that_of_the_rows(
    out: int, in_: int, rank: int, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = DoRALinear(nn.Linear(in_, out), rank, ALPHA)
    with torch.no_grad():
        layer.lora_B.normal_(std=10**size)
    expected = direction(layer).norm(dim=1)
    # The squares are summed up in float32, where W and s B A may cancel.
    parts = linears.dense_weight(layer.base).double().norm(dim=1) + (
        ALPHA / rank * layer.lora_B.double() @ layer.lora_A.double()
    ).norm(dim=1)
    tolerance = (16 * torch.finfo(torch.float32).eps) ** 0.5 * parts
    assert ((layer.norm().double() - expected).abs() <= tolerance).all()
    safe = expected > 0.3 * parts
    assert torch.allclose(layer.norm().double()[safe], expected[safe], rtol=2e-5)


def test_rows_that_cancel_stay_finite() -> None:
    layer = make(rank=OUT)
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(OUT, IN))
        layer.lora_B.zero_()
        layer.base.weight[0] = 0  # a row of zeros has no direction
        layer.lora_B[1] = -layer.base.weight[1, :OUT] / layer.scale  # W + s B A vanishes
        layer.base.weight[1, OUT:] = 0
    layer.load_state_dict(layer.state_dict())  # counts the norms again
    y = layer(torch.randn(3, IN))
    assert y.isfinite().all()
    assert torch.allclose(y[:, 0], layer.bias[0])
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
    layer.eval().merge()
    assert layer.base.weight.isfinite().all()


@pytest.mark.parametrize("seed", range(8))
def test_a_square_that_rounding_makes_negative_counts_as_zero(seed: int) -> None:
    layer = make(seed=seed)
    with torch.no_grad():
        layer.base.weight.copy_(-layer.scale * layer.lora_B @ layer.lora_A)
    layer.load_state_dict(layer.state_dict())  # counts the norms again
    assert layer.norm().isfinite().all()


def test_the_norm_does_not_build_b_a() -> None:
    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **kwargs or {})
            if function.overloadpacket not in (torch.ops.aten.detach, torch.ops.aten.t):
                shapes.extend([r.shape for r in (result,) if isinstance(r, Tensor)])
            return result

    layer, shapes = make(), []
    with Products():
        layer.norm()
    assert (OUT, RANK) in shapes
    assert (OUT, IN) not in shapes


def test_the_norm_is_a_constant_in_the_gradient() -> None:
    layer = make(dtype=torch.float64)
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, OUT, dtype=torch.float64)
    wanted = [layer.lora_A, layer.lora_B, layer.magnitude, x]
    ours = torch.autograd.grad((layer(x) * weights).sum(), wanted)
    v = layer.base.weight + layer.scale * layer.lora_B @ layer.lora_A
    gain = layer.magnitude / v.norm(dim=1).detach()
    y = nn.functional.linear(x, gain[:, None] * v, layer.bias)
    for left, right in zip(ours, torch.autograd.grad((y * weights).sum(), wanted), strict=True):
        assert torch.allclose(left, right, rtol=1e-10)
        assert right.abs().max() > 0.1

    def fixed(A: Tensor, B: Tensor, magnitude: Tensor, x: Tensor) -> Tensor:
        v_ = layer.base.weight + layer.scale * B @ A
        return nn.functional.linear(x, (magnitude / v.norm(dim=1).detach())[:, None] * v_)

    assert torch.autograd.gradcheck(fixed, wanted)  # finite differences


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_dropout_is_pefts(kind: str) -> None:
    """Dropout hits what the update and the rescaled W see, not the base's own output."""
    ours = make(kind, dropout=0.4).train()
    holder = nn.ModuleDict({"layer": copy.deepcopy(ours.base)})
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.4, use_dora=True, target_modules=["layer"],
        fan_in_fan_out=kind == "conv1d",
    )  # fmt: skip
    theirs = peft.get_peft_model(holder, config).base_model.model["layer"].train()
    theirs.lora_A.default.weight.data.copy_(ours.lora_A)
    theirs.lora_B.default.weight.data.copy_(ours.lora_B)
    theirs.lora_magnitude_vector.default.weight.data.copy_(ours.magnitude)
    x = torch.randn(6, IN)
    torch.manual_seed(3)
    left = ours(x)
    torch.manual_seed(3)
    right = theirs(x)
    assert torch.allclose(left, right, atol=1e-5)
    assert (left - ours.eval()(x)).abs().max() > 0.5


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_rounds_once_and_unmerging_is_exact(kind: str, dtype: torch.dtype) -> None:
    layer = make(kind, dtype)
    before, storage = layer.base.weight.detach().clone(), layer.base.weight.data_ptr()
    delta = layer.delta()
    layer.merge()
    wide = torch.promote_types(dtype, torch.float32)
    W = (before.T if kind == "conv1d" else before).to(wide)
    v = W + layer.lora_B @ layer.lora_A * layer.scale
    expected = (layer.magnitude / v.norm(dim=1))[:, None] * v
    merged = linears.dense_weight(layer.base)
    assert torch.equal(merged, expected.detach().to(dtype))
    assert torch.equal(delta, (expected - W).detach())
    assert torch.equal(layer.delta(), delta)  # merged or not
    assert layer.base.weight.data_ptr() == storage
    saved = layer.state_dict()["base.weight"]
    assert torch.equal(saved, before)
    for _ in range(3):
        layer.unmerge()
        layer.merge()
    layer.unmerge()
    assert torch.equal(layer.base.weight, before)


def test_the_report_of_a_merge_measures_dora_too() -> None:
    model = tiny_bart().to(torch.bfloat16)
    minilora.inject(model, minilora.LoRAConfig(rank=2, alpha=3.0, targets=("fc1",), dora=True))
    with torch.no_grad():
        for parameter in minilora.trainable_parameters(model):
            parameter += 0.1 * torch.randn_like(parameter)
    for rounding in minilora.merge(model).modules:
        assert 2**-8 < rounding.lost < 0.5


def test_moving_and_loading_count_the_norm_again() -> None:
    layer = make()
    other = make(seed=7)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.squares, other.squares)
    assert torch.equal(layer.norm(), other.norm())
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.squares.dtype == torch.float32
    expected = half.base.weight.float().norm(dim=1)
    assert torch.allclose(half.squares.sqrt(), expected, rtol=1e-6)
    assert "squares" not in layer.state_dict()


def test_it_pickles_and_copies() -> None:
    layer, x = make(), torch.randn(3, IN)
    for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(again(x), layer(x))
        assert again.magnitude is not layer.magnitude


def test_a_whole_model_trains_merges_and_is_the_base_when_disabled() -> None:
    base = logits(tiny_bart())
    model = adapted("bart", dora=True)
    names = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"lora_A", "lora_B", "magnitude"}
    expected = logits(model)
    assert (expected - base).abs().max() > 0.1
    with minilora.disabled(model):
        assert torch.equal(logits(model), base)
    minilora.merge(model)
    # float32 rounds the merged weights: 2e-5 of logits of 6
    assert (logits(model) - expected).abs().max() < 1e-4
    with minilora.disabled(model):
        assert torch.equal(logits(model), base)
    minilora.unmerge(model)
    assert torch.equal(logits(model), expected)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    minilora.save_adapter(adapted("bart", dora=True), tmp_path)
    return tmp_path


def test_a_dora_file_that_says_it_is_none_is_refused(directory: Path) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": False}))
    model = tiny_bart()
    state = State.of(model)
    with pytest.raises(LoRAError, match=r"lora_magnitude_vector: .* asks for no dora"):
        minilora.load_adapter(model, directory)
    state.check(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(tiny_bart(), directory)  # and PEFT loads it
    assert not any("magnitude" in name for name, _ in theirs.named_parameters())


def test_magnitudes_that_are_missing_or_mis_shaped_are_named(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("magnitude_vector"))
    for change, message in [
        ({key: None}, f"missing key {key}"),
        ({key: tensors[key][:-1]}, f"{key} is a torch.float32 tensor of shape (15,), not"),
        ({key: tensors[key][None]}, "of shape (1, 16), not floating point of shape (16,)"),
        ({key: tensors[key] * math.inf}, "not finite"),
    ]:
        changed = {k: v for k, v in (tensors | change).items() if v is not None}
        save_file({k: v.contiguous() for k, v in changed.items()}, path)
        with pytest.raises(LoRAError, match=re.escape(message)):
            minilora.read_adapter(directory)


def test_swapping_between_dora_and_lora_injects_anew(directory: Path, tmp_path: Path) -> None:
    minilora.save_adapter(adapted("bart"), tmp_path / "plain")
    model = tiny_bart()
    minilora.load_adapter(model, directory)
    dora = logits(model)
    report = minilora.load_adapter(model, tmp_path / "plain")
    assert not report.swapped
    assert torch.equal(logits(model), logits(adapted("bart")))
    assert not minilora.load_adapter(model, directory).swapped
    assert torch.equal(logits(model), dora)
    assert minilora.load_adapter(model, directory).swapped
    assert torch.equal(logits(model), dora)


def test_a_bias_on_b_does_not_go_with_dora() -> None:
    with pytest.raises(LoRAError, match=r"lora_bias goes with .* not with dora"):
        minilora.LoRAConfig(dora=True, lora_bias=True)
