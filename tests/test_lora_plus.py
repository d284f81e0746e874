"""LoRA+: two groups, every parameter once, and B's rate is the ratio's multiple."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import minilora
from minilora import LoRAConfig, LoRAError, parameter_groups
from minilora.inject import lora_layers
from minilora.methods import AdaLoRAConfig
from tests.conftest import adapted, config_for, tiny_bart

OPTIMIZERS = [
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop,
    torch.optim.NAdam, torch.optim.Adadelta,
]  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"dora": True}, {"bias": "all"}, {"lora_bias": True}])
def test_every_parameter_that_trains_is_in_one_group(changes: dict[str, object]) -> None:
    model = adapted(**changes)
    slow, fast = parameter_groups(model, 1e-3, ratio=8)
    assert (slow["lr"], fast["lr"]) == (1e-3, 8e-3)
    found = [id(p) for group in (slow, fast) for p in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in minilora.trainable_parameters(model)}
    assert {id(p) for p in fast["params"]} == {
        id(layer.lora_B) for layer in lora_layers(model).values()
    }


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda each: each.__name__)
def test_every_optimizer_takes_the_groups(optimizer: Callable[..., Any]) -> None:
    model = adapted()
    made = optimizer(parameter_groups(model, 1e-3))
    ids = torch.arange(4, 10)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    with minilora.verify_training(model, made) as report:
        for _ in range(2):
            made.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            made.step()
    assert report.problems == []


def test_the_groups_are_peft_s() -> None:
    settings = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "fc1"])
    theirs = peft.get_peft_model(tiny_bart(), settings)
    made = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8)
    names = {id(p): n for n, p in theirs.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in made.param_groups for p in group["params"]}
    ours = adapted()
    groups = parameter_groups(ours, 1e-3, ratio=8)
    own = {id(p): n for n, p in ours.named_parameters()}
    found = {
        f"base_model.model.{own[id(p)]}.default.weight": group["lr"]
        for group in groups
        for p in group["params"]
    }
    assert found == rates


def test_b_takes_steps_that_are_longer_by_the_ratio() -> None:
    """By SGD, whose step is the rate times the gradient."""
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    ids = torch.arange(4, 10)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(parameter_groups(model, 0.01, ratio=4)).step()
    for name, value in before.items():
        p = model.get_parameter(name)
        rate = 0.04 if name.endswith("lora_B") else 0.01
        assert torch.allclose(p, value - rate * p.grad, rtol=1e-6, atol=1e-7)
        assert not torch.equal(p, value)


def test_adalora_allocates_with_two_groups() -> None:
    model = tiny_bart()
    minilora.inject(model, AdaLoRAConfig(rank=4, target_rank=1, total_steps=4))
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2))
    ids = torch.arange(4, 10)[None]
    for _ in range(4):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    layers = lora_layers(model).values()
    assert sum(int(layer.lora_E.count_nonzero()) for layer in layers) == len(layers)


def test_what_makes_no_sense_is_refused() -> None:
    model = tiny_bart()
    with pytest.raises(LoRAError, match="no B trains in the model"):
        parameter_groups(model, 1e-3)
    minilora.inject(model, config_for())
    for rate, ratio in ((0, 16), ("a", 16), (1e-3, 0), (1e-3, float("nan")), (float("inf"), 1)):
        with pytest.raises(LoRAError, match="must be a finite number above 0"):
            parameter_groups(model, rate, ratio)  # type: ignore[arg-type]
    frozen = nn.ModuleDict({"fc": nn.Linear(8, 8)})
    minilora.inject(frozen, LoRAConfig(rank=2, targets=("fc",)))
    frozen.requires_grad_(False)
    with pytest.raises(LoRAError, match="no B trains"):
        parameter_groups(frozen, 1e-3)
