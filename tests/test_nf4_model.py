"""Models in four bits: the way there, adapters, the way back."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import minilora
from minilora import LoRAConfig, LoRAError, LoRALinear, NF4Linear
from tests.conftest import State, inputs, logits, randomize_adapter, tiny_bart
from tests.four_bits import MIXED, quantized_bart, weight

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


def test_attention_is_query_and_value() -> None:
    report = minilora.quantize(tiny_bart(d_model=32), targets="attention")
    assert report.modules == minilora.quantize(tiny_bart(d_model=32), ("q_proj", "v_proj")).modules
    with pytest.raises(LoRAError, match="'attention': no known projections"):
        minilora.quantize(nn.ModuleDict({"fc": nn.Linear(64, 64)}), targets="attention")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("q_prj",)}, "'q_prj': nothing matches"),
        ({"exclude": ["lm_head", "q_porj"]}, "quantize: exclude: 'q_porj': nothing matches"),
        ({"exclude": "["}, r"quantize: exclude: '\[' is not a regular expression"),
        ({"targets": "["}, r"quantize: targets: '\[' is not a regular expression"),
        ({"exclude": None}, "quantize: exclude must be"),
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


@pytest.mark.parametrize(
    "normed", [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.spectral_norm]
)
def test_a_weight_that_is_computed_anew_is_named(normed: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 64), normed(nn.Linear(64, 64)))
    with pytest.raises(LoRAError, match="1: its weight is computed anew at every call; exclude it"):
        minilora.quantize(model, targets=("0", "1"))
    assert type(model[0]) is nn.Linear


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
    assert "1 linear in 4 bits: 0.0 MB" in str(minilora.quantize(nn.Sequential(nn.Linear(0, 3))))


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


def test_a_linear_with_a_forward_of_its_own_is_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * super().forward(x)

    falcon = type("FalconLinear", (Scaled,), {})  # has one too, which computes the same
    model = nn.ModuleDict({"a": Scaled(8, 8), "b": nn.Linear(8, 8), "c": falcon(8, 8)})
    report = minilora.quantize(model)
    assert (report.modules, report.left_out) == (("b", "c"), ("a",))
    with pytest.raises(LoRAError, match="only plain linears"):
        minilora.quantize(nn.ModuleDict({"a": Scaled(8, 8)}), targets=("a",))


def test_linears_that_transformers_reads_without_a_call_are_left_alone() -> None:
    config = transformers.WavLMConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, conv_dim=(8,), conv_stride=(2,), conv_kernel=(4,),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = transformers.WavLMModel(config).eval()
    x = weight(1, 400, scale=1)
    before = model(x).last_hidden_state
    report = minilora.quantize(model)
    assert any(name.endswith("intermediate_dense") for name in report.modules)
    assert not any(name.endswith("_proj") for name in report.modules)
    assert {name.rpartition(".")[2] for name in report.left_out} == {
        "q_proj", "k_proj", "v_proj", "out_proj",
    }  # fmt: skip
    assert "attention.q_proj, which does more than x W^T + b, or is not called" in str(report)
    # Four bits: 0.26 to 0.53 of outputs of 3, over eight seeds; NaN if an attention reads codes.
    assert 0 < (model(x).last_hidden_state - before).abs().max() < 1
    with pytest.raises(LoRAError, match=r"q_proj lies in a WavLMAttention, .*; exclude it"):
        minilora.quantize(model, targets=["q_proj"])


@pytest.mark.parametrize("frozen", [False, True])
def test_a_dequantized_weight_trains_if_it_did_before(frozen: bool) -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(64, 64)}).requires_grad_(not frozen)
    minilora.quantize(model)
    minilora.inject(model, LoRAConfig(rank=2, targets=("q_proj",)))
    minilora.unwrap(model, dequantize=True)
    assert [p.requires_grad for p in model.parameters()] == [not frozen] * 2


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
        with pytest.raises(LoRAError, match=r"quantized.*lose the update.*dequantize=True"):
            call(model)
    before.check(model)
    assert torch.equal(logits(model), output)


@pytest.mark.parametrize("changes", [{}, {"dora": True}, {"lora_bias": True}])
def test_unwrap_dequantizes_into_plain_linears(
    changes: dict[str, object],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("INFO", "minilora")
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
    assert "rounding error at most 0 an entry" in caplog.text
    assert capsys.readouterr() == ("", "")  # a library prints nothing


def test_unwrap_into_bf16_reports_the_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "minilora")
    model = quantized_bart().bfloat16()
    minilora.inject(model, LoRAConfig(rank=2, alpha=7, targets=MIXED))
    randomize_adapter(model)
    exact = minilora.unwrap(copy.deepcopy(model).float(), dequantize=True)
    caplog.clear()
    minilora.unwrap(model, dequantize=True)
    pairs = [
        (m.weight, dict(exact.named_modules())[name].weight)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name != "lm_head"
    ]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}  # so that it runs
    assert logits(model).isfinite().all()
    assert all(torch.equal(rounded, whole.bfloat16()) for rounded, whole in pairs)  # once
    largest = max((r.float() - w).abs().max().item() for r, w in pairs)
    printed = caplog.messages[0]
    assert printed.startswith(f"{len(pairs)} linears dequantized")
    assert f"rounding error at most {largest:.2g} an entry" in printed
    assert largest > 0


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
    with minilora.disabled(model):
        effect = (logits(model) - output).abs().max()
    minilora.unwrap(model, dequantize=True)
    assert {p.dtype for p in model.parameters()} == {dtype}
    # W + s B A is rounded once in place of each product: at most 10.5 eps of the largest logit were
    # seen in 16 bits, 23 in float32, in which float64 dequantizes too.
    single = torch.finfo(torch.float32).eps
    tolerance = 15 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 40 * single
    assert (logits(model) - output).abs().max() <= tolerance * output.abs().max()
    assert effect > output.abs().max()


def test_what_does_not_fit_the_dtype_leaves_the_model_as_it_was() -> None:
    model = tiny_bart(d_model=32).half()
    minilora.quantize(model)
    minilora.inject(model, LoRAConfig(rank=2, targets=MIXED))
    with torch.no_grad():
        for layer in (model.model.decoder.layers[0].fc1, model.model.encoder.layers[0].fc1):
            layer.lora_B[:], layer.lora_A[:] = 1e3, 1e3
    before = State.of(model)
    with pytest.raises(LoRAError, match=r"overflows torch\.float16.*model\.float"):
        minilora.unwrap(model, dequantize=True)
    before.check(model)
    minilora.unwrap(model.float(), dequantize=True)
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
