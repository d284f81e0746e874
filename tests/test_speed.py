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
from minilora.fused import keep_mask
from minilora.summarization.cli import train_main
from minilora.summarization.errors import UserError
from minilora.summarization.model import attention as attentions
from minilora.summarization.model import speed
from minilora.summarization.model.attention import attention
from minilora.summarization.model.loading import load_model
from minilora.summarization.model.speed import CheapStep
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


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_below_the_lowest_adapted_layer_nothing_is_kept_for_a_backward(side: str) -> None:
    model = small_bart(encoder_layers=2, decoder_layers=2)
    config = minilora.LoRAConfig(rank=3, targets=rf".*{side}.layers.1.*\.(q_proj|v_proj)")
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
    assert wanted[f"model.{side}.layers.1"]
    parts = ["encoder.l", "decoder.layers.0"] if side == "decoder" else ["encoder.layers.0"]
    below = {name for name in wanted if any(part in name for part in parts)}
    assert len(below) > 9
    assert not any(wanted[name] for name in below)


def test_cheap_dropout_drops_the_right_share_and_passes_its_gradient() -> None:
    x = torch.ones(300, 400, requires_grad=True)
    torch.manual_seed(0)
    with CheapStep():
        y = F.dropout(x, 0.2)
        assert F.dropout(x, 0.2, training=False) is x
        assert torch.equal(F.dropout(x, 1.0), torch.zeros_like(x))
        assert nn.Dropout(0.2)(x).grad_fn.name() == y.grad_fn.name() == "_DropoutBackward"
    assert set(y.unique().tolist()) == {0.0, 1.25}
    assert y.mean().item() == pytest.approx(1, abs=0.006)  # 120,000 draws: four deviations
    (2 * y).sum().backward()
    assert torch.equal(x.grad, 2 * y.detach())
    assert F.dropout(x, 0.2).grad_fn.name() != "_DropoutBackward"


@pytest.mark.parametrize("width", [3, 16], ids=["computed again", "kept"])
@pytest.mark.parametrize("mask", ["none", "padding", "added", "causal"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_attention_is_torchs_with_its_gradients(
    width: int, mask: str, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attentions, "CHUNK", 2 * 2 * 20 * 30)  # two of three examples at once
    draw = torch.Generator().manual_seed(0)
    b, h, t, s = 3, 2, 30 if mask == "causal" else 20, 30

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    inputs = [random(b, n, h, width).transpose(1, 2).requires_grad_() for n in (t, s, s)]
    G = random(b, h, t, width)
    padding = (torch.arange(s) < torch.tensor([30, 21, 5])[:, None])[:, None, None, :]
    given = {"padding": padding, "added": random(1, 1, t, s)}.get(mask)
    q, k, v = inputs
    torch.manual_seed(7)
    found = attention(q, k, v, given, p, mask == "causal", scale=0.7)
    torch.manual_seed(7)
    m = keep_mask(q.new_empty(b, h, t, s), p) if p else 1
    scores = 0.7 * q @ k.mT
    if mask == "causal":
        scores = scores.masked_fill(~torch.ones(t, s, dtype=torch.bool).tril(), -torch.inf)
    elif given is not None:
        added = given.dtype == torch.float64
        scores = scores + given if added else scores.masked_fill(~given, -torch.inf)
    wanted = (m * scores.softmax(-1) / (1 - p)) @ v
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)  # float64
    for one, other in zip(
        torch.autograd.grad(found, inputs, G), torch.autograd.grad(wanted, inputs, G), strict=True
    ):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_attention_in_16_bits_is_as_exact_as_eager_attention_and_keeps_less() -> None:
    def kept(implementation: str, autocast: bool = True) -> tuple[int, torch.Tensor]:
        torch.manual_seed(0)
        model = adapted(max_position_embeddings=256).train()
        model.set_attn_implementation(implementation)
        ids = torch.arange(4, 204).remainder(60)[None].repeat(2, 1) + 4
        held: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda t: t)
        with CheapStep(), hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            states = model.get_encoder()(input_ids=ids).last_hidden_state
        states.sum().backward()
        return sum(held.values()), states.detach()

    _, exact = kept("eager", autocast=False)
    eager, one = kept("eager")
    ours, other = kept("sdpa")
    assert ours < 0.5 * eager
    assert not torch.equal(one, other)  # another order of the roundings
    assert (other - exact).norm() < 1.1 * (one - exact).norm()


def test_float32_without_dropout_and_other_shapes_take_torchs_kernel() -> None:
    q = torch.randn(2, 2, 5, 8, requires_grad=True)
    few = torch.randn(2, 1, 5, 8)  # heads of keys and values that the queries share
    with CheapStep():
        plain = F.scaled_dot_product_attention(q, q, q)
        flat = F.scaled_dot_product_attention(*[q[0].bfloat16()] * 3)
        shared = F.scaled_dot_product_attention(q, few, few, dropout_p=0.1, enable_gqa=True)
        ours = F.scaled_dot_product_attention(*[q.bfloat16()] * 3)
        assert not any("_Attention" in y.grad_fn.name() for y in (plain, flat, shared))
        assert "_Attention" in ours.grad_fn.next_functions[0][0].name() + ours.grad_fn.name()
    assert "_Attention" not in F.scaled_dot_product_attention(*[q.bfloat16()] * 3).grad_fn.name()


def test_a_cheap_step_computes_the_same() -> None:
    model = adapted()  # in evaluation mode, so that nothing is dropped
    gradients = []
    for context in (nullcontext(), CheapStep()):
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
