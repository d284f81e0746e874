"""LoftQ's start."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import minilora
from minilora import LoRAConfig, LoRAError, LoRALinear, NF4Linear
from minilora.nf4.loftq import loftq
from tests.conftest import State, logits, tiny_bart
from tests.four_bits import MIXED, linear, quantized_bart, weight


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


def test_loftq_comes_nearer_to_the_weight() -> None:
    base = linear(64, 96)
    A, B = torch.empty(8, 96), torch.empty(64, 8)
    error = (base.weight - loftq(base, A, B, 0.5).dense_weight() - 0.5 * B @ A).norm()
    assert error < 0.9 * (base.weight - NF4Linear(base).dense_weight()).norm()


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_an_empty_linear_comes_back_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "minilora")
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(0, 3))
    minilora.quantize(model)
    minilora.unwrap(model, dequantize=True)
    assert caplog.messages[0].startswith("2 linears dequantized")
    minilora.unwrap(model, dequantize=True)
    assert caplog.messages[1:] == ["0 linears dequantized; rounding error at most 0 an entry"]


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
    with pytest.raises(LoRAError, match=r"v_proj: .* is a NF4Linear: only plain linears can be"):
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
