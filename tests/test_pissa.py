"""PiSSA: the start, the residual, the conversion to plain LoRA, and PEFT's."""

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

import minilora
from minilora import LoRAConfig, LoRAError, LoRALinear, linears
from minilora.inject import lora_layers
from minilora.methods.pissa import PiSSALinear
from tests.conftest import ALPHA, ARCHITECTURES, RANK, config_for, logits, tiny_bart

OUT, IN = 12, 20
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make(
    dtype: torch.dtype = torch.float32, out: int = OUT, in_: int = IN, rank: int = RANK
) -> PiSSALinear:
    torch.manual_seed(0)
    base = nn.Linear(in_, out)
    nn.init.normal_(base.weight)
    return PiSSALinear(base.to(dtype), rank, ALPHA)


def move(model: nn.Module, seed: int = 1, std: float = 0.1) -> None:
    """A and B as they may be after training: near their start."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_A", "lora_B")):
                step = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                parameter += std * step.to(parameter)


def adapted(architecture: str = "bart", **changes: Any) -> PreTrainedModel:
    model = ARCHITECTURES[architecture].build()
    minilora.inject(model, config_for(architecture, init="pissa", **changes))
    move(model)
    return model


def weight_of(layer: PiSSALinear) -> Tensor:
    """W_res + s B A in float64, with W_res from the paper's definition."""
    W = linears.dense_weight(layer.base).double()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    rest = U[:, layer.rank :] * S[layer.rank :] @ Vh[layer.rank :]
    return rest + layer.scale * layer.lora_B.detach().double() @ layer.lora_A.detach().double()


@given(
    out=st.integers(1, 24), in_=st.integers(1, 24), rank=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_the_start_is_the_base_s_output_bit_for_bit(
    out: int, in_: int, rank: int, dtype: torch.dtype
) -> None:
    layer = make(dtype, out, in_, rank)
    x = torch.randn(3, in_).to(dtype)
    for training in (True, False):
        assert torch.equal(layer.train(training)(x), layer.base(x))


@pytest.mark.parametrize("rank", [1, RANK, OUT])
def test_a_and_b_start_as_the_paper_says(rank: int) -> None:
    """Equations 2 and 3, up to the signs of the singular vectors."""
    layer = make(torch.float64, rank=rank)
    _, S, _ = torch.linalg.svd(layer.weight)
    A, B = layer.lora_A, layer.lora_B
    expected = torch.diag(S[:rank] / layer.scale)
    assert torch.allclose(A @ A.T, expected)
    assert torch.allclose(B.T @ B, expected)
    rest = layer.weight - layer.scale * B @ A
    assert torch.linalg.matrix_norm(rest, 2).item() == pytest.approx(
        S[rank].item() if rank < OUT else 0, abs=1e-9
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_the_residual_and_the_adapter(dtype: torch.dtype) -> None:
    layer = make(dtype).eval()
    move(layer)
    x = torch.randn(5, IN).to(dtype)
    weight = weight_of(layer)
    expected = nn.functional.linear(x.double(), weight, layer.bias.double())
    # Sums of 26 terms; in full precision the decomposition, of 12 singular values, counts too.
    roundings = 8 if dtype.itemsize == 2 else 64
    tolerance = roundings * torch.finfo(dtype).eps * expected.abs().max().item()
    assert (layer(x).double() - expected).abs().max() <= tolerance
    assert (layer.base(x).double() - expected).abs().max() > 4 * tolerance  # it did change
    delta = layer.delta().double()
    assert torch.allclose(delta, weight - linears.dense_weight(layer.base).double(), atol=1e-5)


def test_half_precision_keeps_what_little_was_learnt() -> None:
    """Steps of a hundredth of A's and B's size under bfloat16, which has 8 bits: the update is
    nearer to the exact one than with a residual that is stored, as PEFT does it.
    """
    layer = make().eval()
    move(layer, std=0.01)
    x = torch.randn(64, IN)
    exact = x.double() @ (weight_of(layer) - layer.weight.double()).T
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        update = layer(x).double() - layer.base(x).double()
        W, s = layer.weight, layer.scale
        stored = nn.Linear(IN, OUT, bias=False)
        stored.weight.copy_(W - s * layer.start_B @ layer.start_A)
        plain = nn.functional.linear(nn.functional.linear(x, layer.lora_A), layer.lora_B) * s
        theirs = (stored(x) + plain).double() - nn.functional.linear(x, W).double()
    ours, other = (update - exact).norm(), (theirs - exact).norm()
    assert ours < 0.5 * other
    assert exact.norm() > ours


def test_it_compiles_without_a_graph_break() -> None:
    layer = make().eval()
    move(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(3, IN)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_are_those_of_finite_differences(fused: bool) -> None:
    layer = make(torch.float64, out=4, in_=5, rank=2).train()
    layer.fused = fused
    move(layer)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *_: layer(x).tanh(), (x, layer.lora_A, layer.lora_B))


def test_what_is_zero_in_w_can_still_learn() -> None:
    base = nn.Linear(IN, OUT)
    nn.init.zeros_(base.weight)
    layer = PiSSALinear(base, RANK, ALPHA)
    x = torch.randn(3, IN)
    assert torch.equal(layer(x), base(x))
    layer(x).sum().backward()
    assert layer.lora_B.grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_is_exact_and_so_is_its_way_back(dtype: torch.dtype) -> None:
    layer = make(dtype).eval()
    move(layer)
    before, x = layer.weight.clone(), torch.randn(3, IN).to(dtype)
    y = layer(x)
    layer.merge()
    exact = before.double() + layer.delta().double()
    half_ulp = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * (dtype != torch.float64)
    assert ((layer.weight.double() - exact).abs() <= half_ulp).all()  # rounded once
    # units in the last place: 4 occur, and in bf16 the base alone is 19 or more away
    tolerance = 16 * torch.finfo(dtype).eps * y.abs().max().item()
    assert torch.allclose(layer(x), y, atol=tolerance, rtol=0)
    assert not torch.equal(layer.weight, before)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_disabled_and_unload_are_the_original_base(architecture: str) -> None:
    base = logits(ARCHITECTURES[architecture].build())
    model = adapted(architecture)
    assert not torch.allclose(logits(model), base, atol=1e-3)
    with minilora.disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(minilora.unload(model)), base)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_written_is_plain_lora_for_the_original_base(
    architecture: str, rslora: bool, tmp_path: Path
) -> None:
    """Meng et al., appendix C: rank 2r, exact. PEFT and minilora load it on the base as it was."""
    pattern = {ARCHITECTURES[architecture].targets[0]: 2}
    model = adapted(architecture, rank_pattern=pattern, alpha_pattern=pattern, rslora=rslora)
    expected = logits(model)
    minilora.save_adapter(model, tmp_path)
    entries = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (entries["r"], entries["init_lora_weights"]) == (2 * RANK, True)
    loaded = ARCHITECTURES[architecture].build()
    minilora.load_adapter(loaded, tmp_path)
    assert {type(layer) for layer in lora_layers(loaded).values()} == {LoRALinear}
    ranks = {layer.rank for layer in lora_layers(loaded).values()}
    assert ranks == {4, 2 * RANK}
    tolerance = 1e-6 * expected.abs().max().item()  # the same numbers, and s to a rounding
    assert torch.allclose(logits(loaded), expected, rtol=0, atol=tolerance)
    theirs = peft.PeftModel.from_pretrained(ARCHITECTURES[architecture].build(), tmp_path).eval()
    assert torch.allclose(logits(theirs), expected, rtol=0, atol=tolerance)
    # the model that was saved is as before, and takes its own file, as what it is
    assert torch.equal(logits(model), expected)
    assert minilora.config_of(model).init == "pissa"
    minilora.load_adapter(model, tmp_path)
    assert torch.allclose(logits(model), expected, rtol=0, atol=tolerance)


def test_peft_starts_and_trains_alike() -> None:
    """The same W: the same start, the same function of A and B, the same gradients."""
    targets = ARCHITECTURES["bart"].targets
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(targets), init_lora_weights="pissa"
    )
    theirs = peft.get_peft_model(tiny_bart(), settings).eval()
    ours = tiny_bart()
    minilora.inject(ours, config_for(init="pissa"))
    others = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, layer in lora_layers(ours).items():
            A, B = (getattr(others[name], part)["default"].weight for part in ("lora_A", "lora_B"))
            assert torch.allclose(layer.lora_A, A, atol=1e-4)
            assert torch.allclose(layer.lora_B, B, atol=1e-4)
            for mine, other in ((layer.lora_A, A), (layer.lora_B, B)):
                mine += 0.1 * torch.randn(mine.shape, generator=draw)
                other.copy_(mine)
    expected = logits(theirs)
    # their residual is rounded to float32, and so are the sums in another order
    tolerance = 2e-5 * expected.abs().max().item()
    assert torch.allclose(logits(ours), expected, rtol=0, atol=tolerance)
    ids = torch.arange(4, 10)[None]
    for model in (ours, theirs):
        model(input_ids=ids, labels=ids).loss.backward()
    for name, layer in lora_layers(ours).items():
        for part in ("lora_A", "lora_B"):
            other = getattr(others[name], part)["default"].weight.grad
            mine = getattr(layer, part).grad
            assert mine.any()
            assert torch.allclose(mine, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


def test_peft_s_own_file_is_read_on_the_original_base(tmp_path: Path) -> None:
    """It holds A and B only: whoever loads it decomposes W again."""
    targets = ARCHITECTURES["bart"].targets
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(targets), init_lora_weights="pissa"
    )
    theirs = peft.get_peft_model(tiny_bart(), settings).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path / "pissa")
    expected = logits(theirs)
    ours = tiny_bart()
    minilora.load_adapter(ours, tmp_path / "pissa")
    tolerance = 2e-5 * expected.abs().max().item()
    assert {type(layer) for layer in lora_layers(ours).values()} == {PiSSALinear}
    assert torch.allclose(logits(ours), expected, rtol=0, atol=tolerance)
    assert not torch.allclose(logits(tiny_bart()), expected, atol=0.01)
    other = tiny_bart()  # of another scale, and so with another start: not swapped
    minilora.inject(other, config_for(init="pissa", alpha=2 * ALPHA))
    assert not minilora.load_adapter(other, tmp_path / "pissa").swapped
    assert torch.allclose(logits(other), expected, rtol=0, atol=tolerance)
    adapter = minilora.read_adapter(tmp_path / "pissa")
    with pytest.raises(LoRAError, match="cannot combine"):
        minilora.combine([adapter], [1.0])
    minilora.write_adapter(adapter, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(tiny_bart(), tmp_path / "again").eval()
    assert torch.allclose(logits(again), expected, rtol=0, atol=tolerance)


def test_peft_s_conversion_means_the_same(tmp_path: Path) -> None:
    """PEFT converts with the start that was saved, to [B, -B0] [A; A0]; minilora reads that too."""
    targets = list(ARCHITECTURES["bart"].targets)
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights="pissa"
    )
    theirs = peft.get_peft_model(tiny_bart(), settings).eval()
    settings.init_lora_weights = True  # it is `theirs.peft_config["default"]`
    theirs.save_pretrained(tmp_path / "start")
    settings.init_lora_weights = "pissa"
    ours = tiny_bart()
    minilora.inject(ours, config_for(init="pissa"))
    move(ours)
    with torch.no_grad():
        others = dict(theirs.named_parameters())
        for name, layer in lora_layers(ours).items():
            for part in ("lora_A", "lora_B"):
                others[f"base_model.model.{name}.{part}.default.weight"].copy_(getattr(layer, part))
    theirs.save_pretrained(
        tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    loaded, expected = tiny_bart(), logits(ours)
    minilora.load_adapter(loaded, tmp_path / "lora")
    assert {layer.rank for layer in lora_layers(loaded).values()} == {2 * RANK}
    # [B, -B0] [A; A0] cancels in float32 what the differences of `factors` do not
    tolerance = 5e-5 * expected.abs().max().item()
    assert torch.allclose(logits(loaded), expected, rtol=0, atol=tolerance)


def test_training_moves_a_and_b_alone_and_resumes_with_the_same_bits(tmp_path: Path) -> None:
    ids = torch.arange(4, 12)[None]

    def train(model: PreTrainedModel, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

    def start() -> tuple[PreTrainedModel, torch.optim.Optimizer]:
        model = tiny_bart()
        minilora.inject(model, config_for(init="pissa"))
        return model, torch.optim.AdamW(minilora.trainable_parameters(model), lr=1e-2)

    whole, optimizer = start()
    with minilora.verify_training(whole, optimizer) as report:
        train(whole, optimizer, 6)
    assert report.problems == []  # buffers count: A0 and B0 stay
    first, optimizer = start()
    train(first, optimizer, 3)
    torch.save([first.state_dict(), optimizer.state_dict()], tmp_path / "state")
    second, again = start()
    weights, moments = torch.load(tmp_path / "state", weights_only=True)
    second.load_state_dict(weights)
    again.load_state_dict(moments)
    train(second, again, 3)
    assert torch.equal(logits(second), logits(whole))


def test_it_stands_on_four_bits_too() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"fc": nn.Linear(64, 64)})
    minilora.quantize(model, targets=("fc",))
    x = torch.randn(3, 64)
    before = model["fc"](x)
    minilora.inject(model, LoRAConfig(rank=4, targets=("fc",), init="pissa"))
    assert torch.equal(model["fc"](x), before)
    move(model)
    y = model["fc"](x)
    assert not torch.allclose(y, before, atol=0.1)
    plain = minilora.unwrap(model, dequantize=True)
    assert torch.allclose(plain["fc"](x), y, atol=1e-4)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight.data[0, 0] = value
    with pytest.raises(LoRAError, match="b: cannot start from W: it holds values that are not fin"):
        minilora.inject(model, LoRAConfig(rank=2, targets=("a", "b"), init="pissa"))
    assert {type(layer) for layer in model.values()} == {nn.Linear}


@pytest.mark.parametrize("changes", [{"dora": True}, {"lora_bias": True}])
def test_it_goes_with_no_other_layer(changes: dict[str, Any]) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(8, 8)})
    with pytest.raises(LoRAError, match=r"does not go with dora|lora_bias goes with"):
        minilora.inject(model, LoRAConfig(rank=2, targets=("fc",), init="pissa", **changes))
    assert type(model["fc"]) is nn.Linear


def test_a_plain_layer_refuses_the_start() -> None:
    with pytest.raises(LoRAError, match="PiSSALinear"):
        LoRALinear(nn.Linear(8, 8), 2, init="pissa")


def test_plain_lora_of_the_same_shapes_replaces_the_layers(tmp_path: Path) -> None:
    donor = tiny_bart()
    minilora.inject(donor, config_for(init="random"))
    minilora.save_adapter(donor, tmp_path)
    model = adapted()
    assert not minilora.load_adapter(model, tmp_path).swapped
    assert torch.equal(logits(model), logits(donor))
