"""On a GPU: the layers compute what they compute on a CPU, and do not wait for the GPU."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minilora
from minilora import LoRAConfig, LoRALinear
from minilora.nf4.linear import NF4Linear
from minilora.nf4.tensor import pack, unpack

from .helpers import small_bart

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

IN, OUT, RANK, ALPHA = 96, 160, 6, 7.0  # a scale that is no power of two


def make(dtype: torch.dtype = torch.float32, seed: int = 0, dropout: float = 0.0) -> LoRALinear:
    """A training layer whose B is not zero, made on the CPU: the same numbers everywhere."""
    torch.manual_seed(seed)
    layer = LoRALinear(nn.Linear(IN, OUT).to(dtype), RANK, ALPHA, dropout).train()
    nn.init.normal_(layer.lora_B, std=0.3)
    return layer


def inputs(seed: int = 1, rows: int = 64) -> Tensor:
    return torch.randn(4, rows, IN, generator=torch.Generator().manual_seed(seed))


def step(layer: LoRALinear, x: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
    """Output, and gradients of x, A and B."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        y = layer(x)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    (y.float() * weights).sum().backward()
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None
    found = (y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad)
    return [tensor.detach().float().cpu() for tensor in found if tensor is not None]


def close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    """Relative to the largest entry of each: sums of other orders differ by that much."""
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


# The layer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "eager"])
def test_float32_is_what_the_cpu_computes(fused: bool) -> None:
    layer = make()
    layer.fused = fused
    wanted = step(layer, inputs(), None)
    plain = layer.base(inputs()).detach()
    assert (wanted[0] - plain).abs().max() > 0.1  # the adapter does something
    close(step(layer.cuda(), inputs().cuda(), None), wanted, 1e-5)  # 256 products of order 1


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fused_and_eager_agree_under_autocast(base: torch.dtype) -> None:
    layer = make(base).cuda()
    results = []
    for layer.fused in (True, False):
        results.append(step(layer, inputs().cuda(), torch.bfloat16))
    assert layer(inputs().to("cuda", base)).dtype == base
    close(*results, 0.02)  # bf16 has 8 bits, and the roundings are others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_eager_layer_is_the_equation_bit_for_bit(dtype: torch.dtype) -> None:
    layer, x = make(dtype).cuda().eval(), inputs().to("cuda", dtype)
    h = nn.functional.linear(x, layer.lora_A.to(dtype))
    branch = nn.functional.linear(h, layer.lora_B.to(dtype)) * layer.scale
    assert torch.equal(layer(x), layer.base(x) + branch)
    assert not torch.equal(layer(x), layer.base(x))


def test_dropout_repeats_with_the_seed_and_keeps_its_mean() -> None:
    layer, x = make(dropout=0.25).cuda(), torch.ones(1, 20_000, IN, device="cuda")
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(layer(x).detach())
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    # Mean of 20,000 rows: its deviation is 1/141 of a row's.
    deviation = outputs[0].std(dim=1).max() / 141
    assert (outputs[0].mean(dim=1) - layer.eval()(x[:, :1]).squeeze(1)).abs().max() < 6 * deviation


def test_forward_and_backward_do_not_wait_for_the_gpu() -> None:
    layer, x = make(torch.bfloat16, dropout=0.1).cuda(), inputs().cuda().requires_grad_()
    gradient = torch.ones(4, 64, OUT, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
        y.backward(gradient)

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Merging ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_merge_rounds_once_and_unmerge_is_exact(dtype: torch.dtype) -> None:
    layer = make(dtype).cuda()
    weight, x = layer.base.weight.clone(), inputs().to("cuda", dtype)
    unmerged = layer.eval()(x).float()
    storage = layer.base.weight.data_ptr()
    layer.merge()
    wanted = (weight.float() + (layer.lora_B @ layer.lora_A) * layer.scale).to(dtype)
    assert torch.equal(layer.base.weight, wanted)
    assert not torch.equal(layer.base.weight, weight)
    assert layer.base.weight.data_ptr() == storage
    error = (layer(x).float() - unmerged).abs().max() / unmerged.abs().max()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]
    layer.cpu().cuda()
    layer.unmerge()
    assert torch.equal(layer.base.weight, weight)


def test_an_adapter_goes_through_a_file_between_devices(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, IN))
    other = copy.deepcopy(model)
    minilora.inject(model.cuda(), LoRAConfig(rank=RANK, alpha=ALPHA, targets=("0", "1")))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    minilora.save_adapter(model, tmp_path)
    minilora.load_adapter(other, tmp_path)
    assert all(not p.is_cuda for p in other.parameters())
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.cpu(), theirs)


# Four bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nf4_has_the_codes_of_the_cpu(dtype: torch.dtype) -> None:
    weight = torch.randn(320, 512, generator=torch.Generator().manual_seed(2)).to(dtype)
    here, there = pack(weight), pack(weight.cuda())
    for name in here._fields:
        ours, theirs = getattr(here, name), getattr(there, name)
        if name == "offset":  # a mean, summed in another order
            torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-6, atol=0)
        elif isinstance(ours, Tensor) and ours.is_floating_point():
            torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-5, atol=0)
        elif isinstance(ours, Tensor):
            assert torch.equal(theirs.cpu(), ours), name
    wide = unpack(there, weight.shape, torch.float32)
    assert (wide.cpu() - weight.float()).abs().mean() < 0.1  # normal numbers in four bits
    assert wide.is_cuda


def test_a_layer_over_four_bits_trains() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT)
    layer = LoRALinear(NF4Linear(plain), RANK, ALPHA).train()
    nn.init.normal_(layer.lora_B, std=0.3)
    wanted = step(layer, inputs(), None)
    close(step(layer.cuda(), inputs().cuda(), None), wanted, 1e-5)


# Training -----------------------------------------------------------------------------------------


def train(model: Any, dtype: torch.dtype | None, steps: int = 50) -> list[float]:
    """Losses of AdamW, on one batch over and over: it is learned by heart."""
    ids = torch.randint(4, 400, (8, 24), generator=torch.Generator().manual_seed(5)).cuda()
    optimizer = torch.optim.AdamW(minilora.trainable_parameters(model), lr=1e-2, fused=True)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            loss = model(input_ids=ids, labels=ids[:, :6].contiguous()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(None, 1e-3), (torch.bfloat16, 0.05)], ids=["fp32", "bf16"]
)
def test_fifty_steps_fused_and_eager_are_alike(dtype: torch.dtype | None, tolerance: float) -> None:
    """The tolerance is for what 50 steps make of roundings in another order."""
    config = LoRAConfig(rank=4, alpha=13, targets="all-linear")
    base, losses = small_bart(dropout=0.0), []
    for fused in (True, False):
        model = copy.deepcopy(base)
        torch.manual_seed(0)
        minilora.inject(model, config)
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.fused = fused
        losses.append(train(model.cuda().train(), dtype))
    ours, eager = losses
    assert eager[-1] < 0.8 * eager[0]  # it learns
    assert max(abs(a / b - 1) for a, b in zip(ours, eager, strict=True)) < tolerance


def test_optimizer_and_adapter_go_on_from_a_state_dict() -> None:
    """Half the steps, everything through the CPU, the other half: bit for bit one run."""
    layer = make().cuda()
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=1e-2, fused=True)

    def go(layer: LoRALinear, optimizer: torch.optim.Optimizer, first: int) -> None:
        for i in range(first, first + 3):
            optimizer.zero_grad()
            layer(inputs(i).cuda()).square().mean().backward()
            optimizer.step()

    go(layer, optimizer, 0)
    state = {name: t.cpu().clone() for name, t in layer.state_dict().items()}
    moments = copy.deepcopy(optimizer.state_dict())
    for values in moments["state"].values():
        values.update({k: v.cpu() for k, v in values.items() if isinstance(v, Tensor)})
    go(layer, optimizer, 3)
    again = make(seed=9)
    again.load_state_dict(state)
    again.cuda()
    resumed = torch.optim.AdamW([again.lora_A, again.lora_B], lr=1e-2, fused=True)
    resumed.load_state_dict(moments)
    go(again, resumed, 3)
    assert torch.equal(again.lora_B, layer.lora_B)
    assert torch.equal(again.lora_A, layer.lora_A)
    assert not torch.equal(again.lora_B.cpu(), state["lora_B"])


def test_a_compiled_layer_is_the_layer() -> None:
    """Last, since compiling takes longest."""
    layer = make(torch.bfloat16).cuda()
    wanted = step(layer, inputs().cuda(), torch.bfloat16)
    layer.compile(fullgraph=True)
    close(step(layer, inputs().cuda(), torch.bfloat16), wanted, 0.02)
