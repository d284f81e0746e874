"""Adapters added up and extracted: against the dense definition in float64, and against PEFT."""

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import minilora
from minilora import Adapter, LoRAConfig, LoRAError
from minilora.__main__ import singular_values
from minilora.peft_format.apply import adapter_of, apply_adapter
from minilora.peft_format.keys import PREFIX
from tests.conftest import adapted, logits, randomize_adapter, tiny_bart, tiny_gpt2

QV = ("q_proj", "v_proj")


def make(seed: int, **changes: object) -> Adapter:
    model = tiny_bart()
    settings = {"rank": 3, "alpha": 7.0, "targets": QV} | changes
    minilora.inject(model, LoRAConfig(**settings))
    randomize_adapter(model, seed)
    return adapter_of(model)


def delta(adapter: Adapter, module: str) -> Tensor:
    """S B A in float64, by the definition."""
    A, B = (
        adapter.tensors[f"{PREFIX}{module}.{name}.weight"].double() for name in ("lora_A", "lora_B")
    )
    rank = A.shape[0]
    assert rank == adapter.config.rank_of(module)
    scale = adapter.config.alpha_of(module) / (rank**0.5 if adapter.config.rslora else rank)
    return scale * B @ A


def weighted_sum(adapters: list[Adapter], weights: list[float], module: str) -> Tensor:
    return sum(
        weight * delta(adapter, module)
        for adapter, weight in zip(adapters, weights, strict=True)
        if module in adapter.modules
    )


def unlike() -> list[Adapter]:
    """Adapters of different ranks, scales and modules."""
    return [
        make(1),
        make(2, rank=2, alpha=5.0, rslora=True, alpha_pattern={"v_proj": 3.0}),
        make(3, rank=4, targets=(*QV, "fc1"), rank_pattern={"self_attn.q_proj": 2}),
    ]


WEIGHTS = [0.7, -1.3, 0.31]


def test_cat_is_the_weighted_sum_whatever_went_in(tmp_path: Path) -> None:
    adapters = unlike()
    made = minilora.combine(adapters, WEIGHTS)
    assert set(made.modules) == {m for a in adapters for m in a.modules}
    for module in made.modules:
        expected = weighted_sum(adapters, WEIGHTS, module)
        assert expected.norm() > 0.1
        # Exact but for float32's rounding of w s B.
        assert torch.allclose(delta(made, module), expected, rtol=1e-6, atol=1e-6)

    # And it is an adapter like any other: on disk, in a model, in PEFT.
    minilora.write_adapter(made, tmp_path)
    ours, theirs = tiny_bart(), peft.PeftModel.from_pretrained(tiny_bart(), tmp_path).eval()
    minilora.load_adapter(ours, tmp_path)
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-4  # float32, logits of 5
    assert (logits(ours) - logits(tiny_bart())).abs().max() > 0.1
    again = minilora.read_adapter(tmp_path)
    for module in made.modules:
        assert torch.equal(delta(again, module), delta(made, module))


def test_combining_one_adapter_with_weight_one_is_the_adapter() -> None:
    adapter = make(1)
    model, again = tiny_bart(), tiny_bart()
    apply_adapter(model, adapter)
    apply_adapter(again, minilora.combine([adapter], [1.0]))
    # The scale is in B: float32 rounds other products, and logits of 5 differ by 6e-6.
    assert torch.allclose(logits(model), logits(again), rtol=0, atol=1e-4)


def test_what_cannot_be_combined_is_refused() -> None:
    adapter = make(1)
    loftq = replace(adapter.config, init="loftq")
    for adapters, weights, arguments, message in [
        ([], [], {}, "0 adapters"),
        ([adapter], [1.0, 2.0], {}, "one weight each"),
        ([adapter], [float("nan")], {}, "finite"),
        ([adapter], [1.0], {"method": "svd"}, "must be 'cat'.*for a lower rank"),
        ([make(1, dora=True)], [1.0], {}, "cannot combine what is not plain"),
        ([make(1, bias="all")], [1.0], {}, "cannot combine what is not plain"),
        ([make(1, lora_bias=True)], [1.0], {}, "cannot combine what is not plain"),
        ([adapter, replace(adapter, config=loftq)], [1.0, 1.0], {}, "LoftQ's base is quantized"),
    ]:
        with pytest.raises(LoRAError, match=message):
            minilora.combine(adapters, weights, **arguments)


def test_what_two_models_have_is_refused_and_their_names_are_kept_if_equal() -> None:
    one, other = Adapter(make(1).config, make(1).tensors, "a"), make(2)
    widened = {
        key: torch.cat([tensor, tensor], dim=1) if ".lora_A." in key else tensor
        for key, tensor in other.tensors.items()
    }
    with pytest.raises(
        LoRAError,
        match=r"_proj has shapes \[\(16, 16\), \(16, 32\)\] \(out, in\): combine adapters",
    ):
        minilora.combine([one, Adapter(other.config, widened)], [1.0, 1.0])
    for name, kept in (("a", "a"), ("b", None), (None, None)):
        named = Adapter(other.config, other.tensors, name)
        assert minilora.combine([one, named], [1.0, 1.0]).base_model == kept


def test_singular_values_need_no_dense_product() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(3, 50_000), torch.randn(40_000, 3)  # B A would take 8 GB
    values = singular_values(A, B)
    # ||B A||^2, the sum of their squares, is the trace of (B^T B) (A A^T).
    assert torch.allclose(values.square().sum(), (A @ A.T * (B.T @ B)).sum(), rtol=1e-4)
    dense = torch.linalg.svdvals(B[:8] @ A[:, :9])
    assert torch.allclose(singular_values(A[:, :9], B[:8]), dense[:3], rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_extracting_from_a_full_fine_tune(rank: int) -> None:
    base = tiny_bart()
    finetuned = copy.deepcopy(base)
    with torch.no_grad():
        torch.manual_seed(5)
        for name, parameter in finetuned.named_parameters():
            if name.endswith(("proj.weight", "fc1.weight")):
                parameter += 0.1 * torch.randn_like(parameter)
        finetuned.model.encoder.layers[0].fc1.bias += 1
    made = minilora.extract(finetuned, base, rank)
    assert made.left_out == ("model.encoder.layers.0.fc1.bias",)
    kept = f"{len(made.fits)} modules, {made.energy:.2%} of the update's energy kept"
    assert str(made) == f"{kept}; 1 changed parameters left out"
    for fit in made.fits:
        expected = (
            finetuned.get_submodule(fit.module).weight - base.get_submodule(fit.module).weight
        ).double()
        S = torch.linalg.svdvals(expected)
        error = (S[rank:].norm() / S.norm()).item() if S.norm() else 0.0
        assert fit.error == pytest.approx(error, abs=1e-5)  # float32's singular values: 2e-7
        if S.norm():
            apart = (delta(made, fit.module) - expected).norm() / expected.norm()
            assert apart.item() == pytest.approx(error, abs=1e-5)
    assert (made.energy == pytest.approx(1, abs=1e-9)) == (rank == 16)
    if rank == 16:  # every layer's smaller side: the fine-tune itself
        apply_adapter(base, made)
        with torch.no_grad():
            finetuned.model.encoder.layers[0].fc1.bias -= 1
        # W + (W' - W) in float32: 9e-6 of logits of 6
        assert torch.allclose(logits(base), logits(finetuned), rtol=0, atol=1e-4)


def test_extracting_what_lora_did_gives_the_lora_back() -> None:
    model = adapted("bart")
    expected = logits(model)
    made = minilora.extract(minilora.unwrap(model), tiny_bart(), rank=3, targets=(*QV, "fc1"))
    assert made.energy > 1 - 1e-9
    assert made.left_out == ()
    again = tiny_bart()
    apply_adapter(again, made)
    # The merged weights are rounded before they are subtracted: 4e-5 of logits of 5.
    assert torch.allclose(logits(again), expected, rtol=0, atol=3e-4)


def test_attention_stands_for_query_and_value(tmp_path: Path) -> None:
    """The files name the modules."""
    model = adapted("bart")
    tuned = minilora.unwrap(model)
    made = minilora.extract(tuned, tiny_bart(), rank=2, targets="attention")
    assert made.config.targets == QV
    named = minilora.extract(tuned, tiny_bart(), rank=2, targets=QV)
    assert made.config == named.config
    assert made.fits == named.fits
    assert all(torch.equal(tensor, named.tensors[key]) for key, tensor in made.tensors.items())
    asked = Adapter(replace(made.config, targets="attention"), made.tensors)
    minilora.write_adapter(minilora.combine([asked, asked], [0.5, 1.0]), tmp_path)
    entries = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(entries["target_modules"]) == sorted(made.modules)
    summed = minilora.read_adapter(tmp_path)
    for module in made.modules:
        torch.testing.assert_close(delta(summed, module), 1.5 * delta(made, module))


def test_extracting_from_conv1d(tmp_path: Path) -> None:
    base = tiny_gpt2()
    finetuned = copy.deepcopy(base)
    minilora.inject(finetuned, LoRAConfig(rank=3, alpha=7.0, targets=("c_attn", "c_fc")))
    randomize_adapter(finetuned)
    minilora.unwrap(finetuned)
    made = minilora.extract(finetuned, base, rank=3, targets=("c_attn", "c_fc"))
    minilora.write_adapter(made, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out")  # PEFT warns if it is wrong
        theirs = peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path).eval()
    # The same rounding: 2e-5 of logits of 7.
    assert torch.allclose(logits(theirs), logits(finetuned), rtol=0, atol=3e-4)


def test_a_small_update_of_float64_weights_is_kept() -> None:
    base, tuned = (nn.ModuleDict({"fc": nn.Linear(8, 8)}).double() for _ in range(2))
    update = 1e-9 * torch.outer(torch.ones(8), torch.arange(8.0)).double()  # float32 loses it
    tuned["fc"].weight.data = base["fc"].weight.data + update
    A, B = minilora.extract(tuned, base, rank=1).pair("fc")
    assert torch.allclose((B @ A).double(), update, rtol=1e-4, atol=0)  # W + update rounds it too
    tuned["fc"].weight.data[0, 0] = torch.nan
    with pytest.raises(LoRAError, match="fc holds values that are not finite"):
        minilora.extract(tuned, base, rank=1)


def test_models_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(LoRAError, match="differ in names or shapes"):
        minilora.extract(tiny_gpt2(), tiny_bart(), 2)
    with pytest.raises(LoRAError, match="carries an adapter"):
        minilora.extract(adapted("bart"), tiny_bart(), 2)
