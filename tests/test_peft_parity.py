"""PEFT is the reference: with the same A and B, the same bits."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

import minilora
from minilora.inject import lora_layers
from tests.conftest import (
    ALPHA,
    ARCHITECTURES,
    RANK,
    adapted,
    config_for,
    inputs,
    logits,
    randomize_adapter,
)

HALVES = [torch.bfloat16, torch.float16]


def peft_layers(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's wrapped modules by the names they have in the base model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def twins(
    architecture: str, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, peft.PeftModel]:
    """The same base with the same random A and B, adapted here and by PEFT."""
    base = ARCHITECTURES[architecture].build().to(dtype)
    ours, theirs = base, copy.deepcopy(base)
    minilora.inject(ours, config_for(architecture))
    randomize_adapter(ours)
    settings = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=list(ARCHITECTURES[architecture].targets),
        fan_in_fan_out=architecture == "gpt2",
    )
    theirs = peft.get_peft_model(theirs, settings).eval()
    others = peft_layers(theirs)
    assert others.keys() == lora_layers(ours).keys()
    with torch.no_grad():
        for name, layer in lora_layers(ours).items():
            others[name].lora_A["default"].weight.copy_(layer.lora_A)
            others[name].lora_B["default"].weight.copy_(layer.lora_B)
    return ours, theirs


def gradients(model: nn.Module) -> Tensor:
    """The logits, after a backward pass through a loss that is not linear in them."""
    output = model(**inputs(model)).logits
    output.float().log_softmax(-1)[..., 5].sum().backward()
    return output.detach()


def assert_equal_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    others = peft_layers(theirs)
    for name, layer in lora_layers(ours).items():
        assert layer.lora_A.grad.any()
        assert torch.equal(layer.lora_A.grad, others[name].lora_A["default"].weight.grad)
        assert torch.equal(layer.lora_B.grad, others[name].lora_B["default"].weight.grad)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_gradients_are_equal_in_float32(architecture: str) -> None:
    ours, theirs = twins(architecture)
    with minilora.disabled(ours):
        base = logits(ours)
    assert torch.equal(output := gradients(ours), gradients(theirs))
    assert not torch.allclose(output, base, atol=0.1)
    assert_equal_gradients(ours, theirs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_gradients_are_equal_under_bfloat16_autocast(architecture: str) -> None:
    ours, theirs = twins(architecture)
    exact = logits(ours)
    with torch.autocast("cpu", torch.bfloat16):
        output = gradients(ours)
        assert torch.equal(output, gradients(theirs))
    assert not torch.equal(output, exact)  # it did compute in bfloat16
    assert_equal_gradients(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_weights_are_equal(architecture: str, dtype: torch.dtype) -> None:
    ours, theirs = twins(architecture, dtype)
    layers, others = lora_layers(ours), peft_layers(theirs)
    before = {name: layer.base.weight.clone() for name, layer in layers.items()}
    minilora.merge(ours)
    theirs.merge_adapter()
    for name, layer in layers.items():
        assert torch.equal(layer.base.weight, others[name].base_layer.weight)
        assert not torch.equal(layer.base.weight, before[name])
    if dtype == torch.float32:
        assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_unwrapped_model_is_the_one_peft_unloads(architecture: str) -> None:
    ours, theirs = twins(architecture)
    plain, unloaded = minilora.unwrap(ours), theirs.merge_and_unload()
    assert [(n, type(m)) for n, m in plain.named_modules()] == [
        (n, type(m)) for n, m in unloaded.named_modules()
    ]
    left, right = plain.state_dict(), unloaded.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_loads_what_is_saved_here(architecture: str, tmp_path: Path) -> None:
    ours = adapted(architecture)
    minilora.save_adapter(ours, tmp_path)
    base = ARCHITECTURES[architecture].build()
    plain = logits(base)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(theirs), logits(ours))
    assert not torch.allclose(logits(ours), plain, atol=0.1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_peft_saved_is_loaded_here(architecture: str, tmp_path: Path) -> None:
    _, theirs = twins(architecture)
    theirs.save_pretrained(tmp_path)
    ours = ARCHITECTURES[architecture].build()
    minilora.load_adapter(ours, tmp_path)
    assert torch.equal(logits(ours), logits(theirs))
    minilora.save_adapter(ours, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(ARCHITECTURES[architecture].build(), tmp_path / "again")
    assert torch.equal(logits(again), logits(theirs))


# Expressions that mean something in every architecture: what means nothing is an error.
QUERY, WIDE = "(q_proj|q|query|c_attn)", "(fc1|wo|dense|c_fc|down_proj)"
SELECTIONS = {
    "ends": {},
    "all-linear": {"targets": "all-linear"},
    "exclude": {"exclude": rf".*\.{QUERY}"},
    "all-linear but": {"targets": "all-linear", "exclude": r".*\.1\..*"},
    "layers": {"layers": (1,)},
    "layers after a name": {"layers": (0,), "layers_pattern": ("blocks", "(block|layers?|h)")},
    "expression": {"targets": rf".*\.1\..*{QUERY}"},
    "patterns": {
        "rank_pattern": {r"1\..*": 5, WIDE: 2, ".*": 4},
        "alpha_pattern": {QUERY: 3.0, r".*\.0\..*": 11.0},
    },
    "rslora": {"rslora": True},
}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_modules_get_the_same_rank_and_scale(architecture: str, selection: str) -> None:
    config = config_for(architecture, **SELECTIONS[selection])
    theirs = peft.get_peft_model(
        ARCHITECTURES[architecture].build(),
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=_as_list(config.targets),
            exclude_modules=_as_list(config.exclude),
            layers_to_transform=_as_list(config.layers),
            layers_pattern=_as_list(config.layers_pattern),
            rank_pattern=dict(config.rank_pattern),
            alpha_pattern=dict(config.alpha_pattern),
            use_rslora=config.rslora,
            fan_in_fan_out=architecture == "gpt2",
        ),
    )
    expected = {
        name: (layer.r["default"], layer.scaling["default"])
        for name, layer in peft_layers(theirs).items()
    }
    model = ARCHITECTURES[architecture].build()
    minilora.inject(model, config)
    assert len(expected) >= 1
    assert {n: (layer.rank, layer.scale) for n, layer in lora_layers(model).items()} == expected


def _as_list(value: object) -> object:
    return (list(value) or None) if isinstance(value, tuple) else value or None


def test_all_linear_spares_the_classifier_of_a_sequence_classifier_as_peft_does() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=40, num_attention_heads=2, **sizes)
    for task_type in ("SEQ_CLS", None):
        ours, theirs = (BertForSequenceClassification(config) for _ in range(2))
        settings = peft.LoraConfig(target_modules="all-linear", task_type=task_type)
        wanted = set(peft_layers(peft.get_peft_model(theirs, settings)))
        lora = minilora.LoRAConfig(rank=2, targets="all-linear", task_type=task_type)
        assert set(minilora.inject(ours, lora).modules) == wanted
        assert ("classifier" in wanted) is (task_type is None)
