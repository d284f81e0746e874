"""Merging a whole model: exact, all or nothing, reported; `disabled` puts the state back."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import minilora
from minilora import LoRAConfig, LoRAError
from minilora.inject import lora_layers
from tests.conftest import ARCHITECTURES, State, adapted, equal, inputs, logits, tiny_bart, weights
from tests.marks import slow_but

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def states(model: nn.Module) -> list[tuple[bool, bool]]:
    return [(layer.enabled, layer.merged) for layer in lora_layers(model).values()]


@pytest.mark.parametrize("cycles", slow_but([1], [1, 100]))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["bart", "gpt2"])
def test_unmerging_restores_every_weight_of_the_model(
    architecture: str, dtype: torch.dtype, cycles: int
) -> None:
    model = adapted(architecture).to(dtype)
    before = weights(model)
    wrapped = {f"{name}.base.weight" for name in lora_layers(model)}
    for _ in range(cycles):
        minilora.merge(model)
        now = weights(model)
        changed = {name for name in before if not torch.equal(before[name], now[name])}
        assert changed == wrapped
        minilora.unmerge(model)
    assert equal(weights(model), before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_model_computes_what_the_adapted_one_did(architecture: str) -> None:
    model = adapted(architecture)
    active = logits(model)
    minilora.merge(model)
    merged = logits(model)
    assert not torch.equal(merged, active)  # another order of sums
    # float32: 1.4e-5 of logits of 5 to 7; T5's are 31, whose q and k are not scaled: 2.6e-4
    close = 1e-3 if architecture == "t5" else 1e-4
    torch.testing.assert_close(merged, active, rtol=0, atol=close)
    minilora.merge(model)
    assert torch.equal(logits(model), merged)
    minilora.unmerge(model)
    assert torch.equal(logits(model), active)
    minilora.unmerge(model)
    assert torch.equal(logits(model), active)


def test_training_a_merged_model_is_refused_and_inference_is_not() -> None:
    model = adapted()
    minilora.merge(model)
    model.train()
    with pytest.raises(LoRAError, match="cannot train while merged"):
        model(**inputs(model))
    logits(model)  # without gradients
    minilora.unmerge(model)
    model(**inputs(model)).logits.sum().backward()


def test_one_sum_that_does_not_fit_is_named_and_no_layer_is_merged() -> None:
    model = adapted().half()
    layers = lora_layers(model)
    name, last = list(layers.items())[-1]
    with torch.no_grad():
        last.lora_B.fill_(60_000)
    before = State.of(model)
    with pytest.raises(LoRAError, match=rf"{name}: W \+ s B A does not fit torch.float16"):
        minilora.merge(model)
    before.check(model)

    with torch.no_grad():
        last.lora_B.fill_(1)
    first = next(iter(layers.values()))
    first.merge()  # by hand: a failure elsewhere must leave it so
    with torch.no_grad():
        last.lora_B.fill_(60_000)
    before = State.of(model)
    with pytest.raises(LoRAError):
        minilora.merge(model)
    before.check(model)


def test_a_bias_that_does_not_fit_is_refused_before_the_weight_is_written() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 6)}).half()
    minilora.inject(model, LoRAConfig(rank=2, targets=("q_proj",), lora_bias=True))
    with torch.no_grad():
        model["q_proj"].lora_bias.fill_(60_000)
    before = State.of(model)
    with pytest.raises(LoRAError, match=r"q_proj: b \+ s c does not fit torch.float16"):
        minilora.merge(model)
    before.check(model)


def test_no_layer_is_merged_either_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    last = list(lora_layers(model).values())[-1]

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(last, "merge", fail)
    before = State.of(model)
    with pytest.raises(torch.OutOfMemoryError):
        minilora.merge(model)
    before.check(model)


def test_nor_where_it_runs_out_while_the_rounding_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted()
    first = next(iter(lora_layers(model).values()))
    first.merge()  # by hand: it must stay so

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sys.modules["minilora.merge"], "rounding_of", fail)
    before = State.of(model)
    with pytest.raises(torch.OutOfMemoryError):
        minilora.merge(model)
    before.check(model)


@pytest.mark.parametrize(
    "act", [minilora.merge, minilora.unmerge, lambda m: minilora.disabled(m).__enter__()]
)
def test_a_model_without_an_adapter_is_told_so(act: object) -> None:
    with pytest.raises(LoRAError, match="carries no adapter"):
        act(tiny_bart())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_report_is_the_rounding_measured_in_float64(dtype: torch.dtype) -> None:
    model = adapted().to(dtype)
    before, layers = copy.deepcopy(model), lora_layers(model)
    report = minilora.merge(model)
    assert [rounding.module for rounding in report.modules] == list(layers)
    for rounding in report.modules:
        layer, old = layers[rounding.module], before.get_submodule(rounding.module)
        delta = old.delta().double()  # the report takes it for exact; test_layer checks it
        wanted = old.base.weight.double() + delta
        error = layer.base.weight.double() - wanted
        close = {"rel": 1e-6, "abs": 1e-15}  # the same sums in float64
        assert rounding.largest == pytest.approx(error.abs().max().item(), **close)
        assert rounding.lost == pytest.approx((error.norm() / delta.norm()).item(), **close)
        if dtype in (torch.bfloat16, torch.float16):
            assert 0 < rounding.lost * delta.norm() < torch.finfo(dtype).eps * wanted.norm()
    worst = max(report.modules, key=lambda rounding: rounding.lost)
    assert str(report).startswith(f"{len(layers)} modules merged")
    assert worst.module in str(report)
    assert minilora.merge(model) == report  # merged already: the same figures


def test_an_update_that_rounding_swallows_is_reported_as_lost() -> None:
    model = adapted().bfloat16()
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.base.weight.fill_(1)
            layer.lora_A.fill_(1e-3)
            layer.lora_B.fill_(1e-3)
    assert {rounding.lost for rounding in minilora.merge(model).modules} == {1.0}
    assert "at most 1 of an update lost" in str(minilora.merge(model))


def test_a_zero_adapter_loses_nothing() -> None:
    model = adapted()
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.zero_()
    before = weights(model)
    assert {rounding.lost for rounding in minilora.merge(model).modules} == {0.0}
    minilora.unmerge(model)
    assert equal(weights(model), before)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_disabled_gives_the_logits_of_the_base_and_the_state_before_again(
    architecture: str, merged: bool
) -> None:
    base = logits(ARCHITECTURES[architecture].build())
    model = adapted(architecture)
    if merged:
        minilora.merge(model)
    before, active = State.of(model), logits(model)
    with minilora.disabled(model):
        assert torch.equal(logits(model), base)
    before.check(model)
    assert set(states(model)) == {(True, merged)}
    assert torch.equal(logits(model), active)
    assert not torch.allclose(active, base, atol=0.1)


def test_disabled_puts_a_mixed_state_back_when_nested_and_on_exceptions() -> None:
    model = adapted()
    base = logits(tiny_bart())
    for layer in list(lora_layers(model).values())[::2]:
        layer.merge()
    before, mixed, active = State.of(model), states(model), logits(model)
    assert len(set(mixed)) == 2

    def fail() -> None:
        with minilora.disabled(model), minilora.disabled(model):
            assert torch.equal(logits(model), base)
            raise KeyboardInterrupt

    with minilora.disabled(model):
        with minilora.disabled(model):
            assert set(states(model)) == {(False, False)}
        assert torch.equal(logits(model), base)  # the outer one is still on
        with pytest.raises(KeyboardInterrupt):
            fail()
        assert torch.equal(logits(model), base)
    assert states(model) == mixed
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert states(model) == mixed
    before.check(model)
    assert torch.equal(logits(model), active)


@pytest.mark.parametrize("function", [minilora.merge, minilora.unwrap])
@pytest.mark.parametrize("merged", [False, True])
def test_merging_inside_disabled_is_refused_and_the_base_stays(
    merged: bool, function: Callable[[nn.Module], object]
) -> None:
    model, base = adapted(), logits(tiny_bart())
    if merged:
        minilora.merge(model)
    before = logits(model)
    with minilora.disabled(model):
        with pytest.raises(LoRAError, match=r"cannot merge .* inside minilora\.disabled"):
            function(model)
        with pytest.raises(LoRAError, match=r"cannot merge .* inside minilora\.disabled"):
            next(iter(lora_layers(model).values())).merge()
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), before)
    assert all(layer.merged == merged for layer in lora_layers(model).values())


def test_a_merge_that_fails_as_the_block_ends_leaves_all_layers_on() -> None:
    model = adapted().half()
    minilora.merge(model)
    layers = list(lora_layers(model).values())
    with pytest.raises(LoRAError, match="fit"), minilora.disabled(model):
        layers[0].lora_B.data.fill_(6e4)
    assert all(layer.enabled for layer in layers)


@pytest.mark.parametrize("merged", [False, True])
def test_unloading_inside_disabled_is_refused_and_the_base_keeps_its_weights(merged: bool) -> None:
    model, base = adapted(), logits(tiny_bart())
    if merged:
        minilora.merge(model)
    before = State.of(model)
    with minilora.disabled(model), pytest.raises(LoRAError, match="cannot unload inside"):
        minilora.unload(model)
    before.check(model)
    assert torch.equal(logits(minilora.unload(model)), base)


@pytest.mark.parametrize("changes", [{}, {"dora": True}, {"init": "pissa"}, {"lora_bias": True}])
def test_a_model_of_shapes_only_is_injected_and_not_merged(changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"q_proj": nn.Linear(8, 6)})
    minilora.inject(model, LoRAConfig(rank=2, targets=("q_proj",), **changes))
    assert model["q_proj"](torch.empty(3, 8, device="meta")).shape == (3, 6)
    assert model["q_proj"].delta().shape == (6, 8)
    with pytest.raises(LoRAError, match="q_proj: cannot merge on the meta device"):
        minilora.merge(model)
    with pytest.raises(LoRAError, match="cannot merge on the meta device"):
        model["q_proj"].merge()


def test_a_state_dict_of_a_merged_model_is_that_of_the_unmerged() -> None:
    model = adapted()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    minilora.merge(model)
    assert list(model.state_dict()) == list(plain)
    assert equal(dict(model.state_dict()), plain)


@pytest.mark.parametrize("strict", [True, False])
def test_loading_into_a_merged_model_is_refused_and_no_weight_is_changed(strict: bool) -> None:
    model = adapted()
    with torch.no_grad():
        other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    minilora.merge(model)
    before = State.of(model)
    with pytest.raises(LoRAError, match="cannot load weights while merged"):
        model.load_state_dict(other, strict=strict)
    before.check(model)
    minilora.unmerge(model)
    model.load_state_dict(other)
    assert equal(dict(model.state_dict()), other)


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("start", DTYPES)
def test_a_merged_model_converted_unmerges_to_the_converted_base(
    start: torch.dtype, to: torch.dtype
) -> None:
    model = adapted().to(start)
    expected = weights(copy.deepcopy(model).to(to))
    minilora.merge(model)
    minilora.unmerge(model.to(to))
    assert equal(weights(model), expected)
