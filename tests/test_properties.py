"""What holds for every shape, rank, dtype, scale and pattern."""

import copy
import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import minilora
from minilora import Adapter, LoRAConfig
from minilora.config import matches_end
from minilora.methods.dora import DoRALinear
from minilora.methods.lora_bias import LoRABiasLinear
from minilora.peft_format.apply import adapter_of, apply_adapter
from minilora.peft_format.config import config_from_peft, config_to_peft
from minilora.peft_format.keys import PREFIX
from tests.conftest import equal, weights

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
SIDES = st.integers(1, 24)
ALPHAS = st.floats(0.01, 100)
NAMES = ("q_proj", "v_proj", "fc1", "out.proj1")


class Block(nn.Module):
    """Linears and a Conv1D of one width, with and without biases, and a norm between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.fc1 = Conv1D(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc1(self.norm(self.q_proj(x)).tanh() + self.v_proj(x))


class Net(nn.Module):
    def __init__(self, width: int, depth: int, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.to(dtype).eval()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


nets = st.builds(Net, st.integers(2, 16), st.integers(1, 3), DTYPES, st.integers(0, 99))


@st.composite
def configs(draw: st.DrawFn, net: Net, plain: bool = False) -> LoRAConfig:
    weight = net.layers[0].norm.weight
    width, half = weight.shape[0], weight.itemsize < 4  # inject refuses what trains in 16 bits
    targets = draw(st.lists(st.sampled_from(NAMES[:3]), min_size=1, unique=True))
    names = [f"layers.{i}.{target}" for i in range(len(net.layers)) for target in targets]
    ranks = st.integers(1, width)
    keys = st.sampled_from([*targets, r"layers\.0\.[qvf].*", r".*_proj", r"layers.\d.v_proj"])
    settings = {
        "rank": draw(ranks),
        "alpha": draw(ALPHAS),
        "targets": tuple(targets),
        **{
            f"{name}_pattern": {
                key: value
                for key, value in draw(st.dictionaries(keys, values)).items()
                if any(matches_end(key, module) for module in names)  # inject refuses the others
            }
            for name, values in (("rank", ranks), ("alpha", ALPHAS))
        },
        "rslora": draw(st.booleans()),
    }
    if not plain:
        kind = draw(st.sampled_from(["", "dora", "lora_bias"]))
        settings |= {kind: True} if kind and (kind == "dora" or "v_proj" not in targets) else {}
    if not plain and not half:
        settings["bias"] = draw(st.sampled_from(["none", "lora_only", "all"]))
        settings["also_train"] = draw(st.sampled_from([(), ("norm",)]))
    return LoRAConfig(**settings)


def fill(model: nn.Module, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)


def x_for(net: Net) -> Tensor:
    weight = net.layers[0].norm.weight
    draw = torch.Generator().manual_seed(1)
    return torch.randn(3, weight.shape[0], generator=draw).to(weight.dtype)


@given(out=SIDES, in_=SIDES, rank=st.integers(1, 24), dtype=DTYPES, alpha=ALPHAS, data=st.data())
@settings(max_examples=100)
def test_merging_and_unmerging_leaves_every_bit(
    out: int, in_: int, rank: int, dtype: torch.dtype, alpha: float, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from([minilora.LoRALinear, DoRALinear, LoRABiasLinear]))
    base = data.draw(st.sampled_from([nn.Linear(in_, out), Conv1D(out, in_)])).to(dtype)
    size = data.draw(st.floats(-4, 1))
    layer = kind(base, rank, alpha, init="random")
    with torch.no_grad():
        layer.lora_B *= 10**size
    before = weights(layer)
    for _ in range(3):
        layer.merge()
        layer.unmerge()
    assert equal(weights(layer), before)
    layer.merge()
    assert equal(layer.state_dict(), {k: v for k, v in before.items() if k in layer.state_dict()})


@given(net=nets, data=st.data())
def test_injecting_and_unwrapping_is_nothing_while_b_is_zero(net: Net, data: st.DataObject) -> None:
    config = data.draw(configs(net))
    plain, x = copy.deepcopy(net), x_for(net)
    minilora.inject(net, config)
    minilora.unwrap(net)
    if not config.dora:  # m / ||W|| is 1 up to rounding
        assert equal(weights(net), weights(plain))
        assert torch.equal(net(x), plain(x))
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert [type(m) for m in net.modules()] == [type(m) for m in plain.modules()]


@given(net=nets, data=st.data())
def test_disabled_is_the_base(net: Net, data: st.DataObject) -> None:
    config = data.draw(configs(net))
    x = x_for(net)
    base, plain = net(x), copy.deepcopy(net)
    minilora.inject(net, config)
    fill(net)
    before = weights(net)
    with minilora.disabled(net):
        assert torch.equal(net(x), base)
    minilora.merge(net)
    with minilora.disabled(net):
        assert torch.equal(net(x), base)
    minilora.unmerge(net)
    assert equal(weights(net), before)
    assert not torch.equal(net(x), base)
    assert torch.equal(plain(x), base)


@given(net=nets, data=st.data(), size=st.integers(1, 4))
def test_cat_is_the_weighted_sum_of_the_deltas(net: Net, data: st.DataObject, size: int) -> None:
    adapters = []
    for seed in range(size):
        model = copy.deepcopy(net)
        minilora.inject(model, data.draw(configs(net, plain=True)))
        fill(model, seed)
        adapters.append(adapter_of(model))
    weights_ = data.draw(st.lists(st.floats(-5, 5), min_size=size, max_size=size))
    made = minilora.combine(adapters, weights_, "cat")
    for module in made.modules:
        terms = [
            weight * delta(adapter, module)
            for adapter, weight in zip(adapters, weights_, strict=True)
            if module in adapter.modules
        ]
        magnitude = sum(term.abs() for term in terms).max().item()
        apart = (delta(made, module) - sum(terms)).abs().max().item()
        assert apart <= 1e-5 * magnitude + 1e-30
    model = copy.deepcopy(net)
    apply_adapter(model, made)  # its own configuration fits its keys


def delta(adapter: Adapter, module: str) -> Tensor:
    A, B = (adapter.tensors[f"{PREFIX}{module}.lora_{name}.weight"].double() for name in "AB")
    rank = A.shape[0]
    assert rank == adapter.config.rank_of(module)
    root = math.sqrt(rank) if adapter.config.rslora else rank
    return adapter.config.alpha_of(module) / root * B @ A


@given(
    pattern=st.dictionaries(
        st.sampled_from(["a", "b", "a.b", "b.a", ".*a", r"[ab]\.a", "a.*", "(a|b)", r"a\.b"]),
        st.integers(1, 9),
        max_size=5,
    ),
    default=st.integers(1, 9),
    modules=st.sets(
        st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map(".".join), min_size=1
    ),
    scramble=st.randoms(use_true_random=False),
)
@settings(max_examples=100)
def test_resolved_patterns_mean_the_same_in_every_order(
    pattern: dict[str, int], default: int, modules: set[str], scramble: Any
) -> None:
    config = LoRAConfig(rank=default, alpha=default, rank_pattern=pattern, alpha_pattern=pattern)
    names = tuple(sorted(modules))
    entries = config_to_peft(config, names)
    for key in ("rank_pattern", "alpha_pattern"):
        items = list(entries[key].items())
        scramble.shuffle(items)
        entries[key] = dict(items)
    again = config_from_peft(entries, names)
    for name in names:
        assert again.rank_of(name) == config.rank_of(name)
        assert again.alpha_of(name) == config.alpha_of(name)
