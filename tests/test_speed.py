"""Steps made cheaper compute what they computed before."""

import gc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BartForConditionalGeneration

import minilora
from minilora.summarization.cli import train_main
from minilora.summarization.errors import UserError
from minilora.summarization.model import speed
from minilora.summarization.model.loading import load_model
from minilora.summarization.model.speed import CheapDropout
from minilora.summarization.training.loss import summed_loss
from tests.helpers import SMALL, records, save_bart, save_data, small_bart
from tests.test_loss import batch


def adapted(**changes: Any) -> BartForConditionalGeneration:
    model = small_bart(**changes)
    minilora.inject(model, minilora.LoRAConfig(rank=3, targets=["q_proj", "v_proj"]))
    draw = torch.Generator().manual_seed(1)
    for parameter in minilora.trainable_parameters(model):
        parameter.data.normal_(0, 0.3, generator=draw)
    return model


def results(model: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = summed_loss(model, batch())
    loss.backward()
    found = [p.grad.clone() for p in minilora.trainable_parameters(model)]
    model.zero_grad()
    return loss.detach(), found


def test_frozen_linears_in_autocasts_dtype_give_the_same_bits() -> None:
    model = adapted()
    before = results(model)
    speed.hold_frozen_linears(model, None)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    speed.hold_frozen_linears(model, torch.bfloat16)
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    narrow = {id(p) for m in linears for p in m.parameters()}
    assert len(linears) == 6 + 10 + 1
    for parameter in model.parameters():
        assert parameter.dtype == (torch.bfloat16 if id(parameter) in narrow else torch.float32)
    after = results(model)
    assert torch.equal(before[0], after[0])
    assert all(map(torch.equal, before[1], after[1]))


def test_what_dora_wraps_stays_whole_so_that_its_bits_are_the_same_too() -> None:
    model = small_bart()
    minilora.inject(model, minilora.LoRAConfig(rank=3, targets=["q_proj"], dora=True))
    for parameter in minilora.trainable_parameters(model):
        parameter.data += 0.3 * torch.randn(parameter.shape)
    before = results(model)
    speed.hold_frozen_linears(model, torch.bfloat16)
    assert model.model.encoder.layers[0].self_attn.q_proj.base.weight.dtype == torch.float32
    assert model.model.encoder.layers[0].fc1.weight.dtype == torch.bfloat16
    after = results(model)
    assert torch.equal(before[0], after[0])
    assert all(map(torch.equal, before[1], after[1]))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_released_model_does_not_need_its_file(tmp_path: Path) -> None:
    save_bart(tmp_path / "bart")
    model = load_model(str(tmp_path / "bart"), torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file = str(tmp_path / "bart" / "model.safetensors")
    assert file in Path("/proc/self/maps").read_text()  # else there is nothing to release
    speed.release_file(model)
    gc.collect()
    assert file not in Path("/proc/self/maps").read_text()
    assert model.lm_head.weight is model.model.shared.weight
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_trains_stays_in_float32() -> None:
    model = small_bart()
    speed.hold_frozen_linears(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.shared.weight


def test_below_the_lowest_adapted_layer_nothing_is_kept_for_a_backward() -> None:
    model = small_bart(decoder_layers=2)
    config = minilora.LoRAConfig(rank=3, targets=r".*decoder.layers.1.*\.(q_proj|v_proj)")
    minilora.inject(model, config)
    wanted: dict[str, bool] = {}
    for name, module in model.named_modules():
        if name.startswith("model."):

            def look(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                first = output[0] if isinstance(output, tuple) else output
                if isinstance(first, torch.Tensor):
                    wanted[name] = first.requires_grad

            module.register_forward_hook(look)
    model.train()
    summed_loss(model, batch())[0].backward()
    assert wanted["model.decoder.layers.1"]
    below = {name for name in wanted if "encoder.l" in name or "decoder.layers.0" in name}
    assert len(below) > 20
    assert not any(wanted[name] for name in below)


def test_cheap_dropout_drops_the_right_share_and_passes_its_gradient() -> None:
    x = torch.ones(300, 400, requires_grad=True)
    torch.manual_seed(0)
    with CheapDropout():
        y = F.dropout(x, 0.2)
        assert F.dropout(x, 0.2, training=False) is x
        assert torch.equal(F.dropout(x, 1.0), torch.zeros_like(x))
        assert nn.Dropout(0.2)(x).grad_fn.name() == y.grad_fn.name() == "_DropoutBackward"
    assert set(y.unique().tolist()) == {0.0, 1.25}
    assert y.mean().item() == pytest.approx(1, abs=0.006)  # 120,000 draws: four deviations
    (2 * y).sum().backward()
    assert torch.equal(x.grad, 2 * y.detach())
    assert F.dropout(x, 0.2).grad_fn.name() != "_DropoutBackward"


@pytest.mark.parametrize("attention_dropout", [0.0, 0.1])
def test_eager_attention_over_long_texts_only_where_it_drops_out(attention_dropout: float) -> None:
    model = small_bart(attention_dropout=attention_dropout)
    chosen = model.config._attn_implementation
    with speed.cheap_step(model, speed.EAGER_POSITIONS + 1):
        wanted = "eager" if attention_dropout else chosen
        assert model.config._attn_implementation == wanted
    assert model.config._attn_implementation == chosen


def test_a_cheap_step_attends_eagerly_over_short_texts_only() -> None:
    model = small_bart()
    assert model.config._attn_implementation == "sdpa"
    seen = []
    for positions in (speed.EAGER_POSITIONS, speed.EAGER_POSITIONS + 1):
        with speed.cheap_step(model, positions):
            seen.append(model.config._attn_implementation)
            dropped = F.dropout(torch.ones(9, requires_grad=True), 0.1)
            assert dropped.grad_fn.name() == "_DropoutBackward"
    assert seen == ["eager", "sdpa"]
    with pytest.raises(RuntimeError, match="out of memory"), speed.cheap_step(model, 1):
        raise RuntimeError("out of memory")
    assert model.config._attn_implementation == "sdpa"


def test_a_cheap_step_computes_the_same() -> None:
    model = adapted()  # in evaluation mode, so that nothing is dropped
    gradients = []
    for context in (nullcontext(), speed.cheap_step(model, 10)):
        with context:
            loss, _ = summed_loss(model, batch())
            loss.backward()
        gradients.append([p.grad.clone() for p in minilora.trainable_parameters(model)])
        model.zero_grad()
    assert all(gradient.any() for gradient in gradients[0])
    for one, other in zip(*gradients, strict=True):  # float32: other orders of the same sums
        assert (one - other).norm() < 1e-5 * one.norm()


def test_checkpointed_activations_give_the_same_gradients_with_the_same_dropout() -> None:
    model = adapted().train()
    before = results(model)
    speed.checkpoint_activations(model)
    calls: list[int] = []
    model.model.encoder.layers[0].fc1.register_forward_hook(lambda *_: calls.append(1))
    after = results(model)
    assert len(calls) == 2  # computed again in the backward pass
    assert torch.equal(before[0], after[0])
    assert all(map(torch.equal, before[1], after[1]))
    assert all(gradient.any() for gradient in after[1])


@pytest.mark.slow
def test_compiled_layers_compute_the_same_and_keep_their_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted()  # without dropout, which the compiler draws in another way
    before, names = results(model), list(model.state_dict())
    original = nn.Module.compile  # Inductor would take a minute
    monkeypatch.setattr(
        nn.Module, "compile", lambda m, **more: original(m, backend="eager", **more)
    )
    speed.compile_layers(model)
    after = results(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(after[0], before[0], rtol=1e-2, atol=0)
    for one, other in zip(after[1], before[1], strict=True):
        # bf16 rounds at 4e-3 of the largest
        torch.testing.assert_close(one, other, rtol=0, atol=0.05 * other.abs().max().item())
    with speed.uncompiled(model), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(summed_loss(model, batch())[0], before[0])


def test_a_model_without_layers_cannot_be_compiled() -> None:
    with pytest.raises(UserError, match="--compile: found no layers"):
        speed.compile_layers(nn.Linear(2, 2))


@pytest.mark.parametrize("flag", ["--checkpoint-activations", "--compile"])
def test_a_run_with_the_flag_ends_as_one_without(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []  # that the compiler computes the same is tested above
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: compiled.append(module))
    save_bart(tmp_path / "bart", dropout=0.0, attention_dropout=0.0)
    save_data(tmp_path / "data", train=7)
    argv = ["--model", str(tmp_path / "bart"), "--data", str(tmp_path / "data"), *SMALL]
    argv += ["--rank", "3", "--epochs", "1", "--no-evaluate", "--output"]
    losses = []
    for more in ([], [flag]):
        run = tmp_path / f"run{len(more)}"
        assert train_main([*argv, str(run), "--dropout", "0", *more]) == 0
        losses.append([r["loss"] for r in records(run) if r["kind"] in ("step", "validation")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(compiled) == (2 if flag == "--compile" else 0)  # an encoder and a decoder layer
