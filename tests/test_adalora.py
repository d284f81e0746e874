"""AdaLoRA: the equations, the step that nobody has to call, files, and PEFT's allocator."""

import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.adalora.layer import RankAllocator
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import minilora
from minilora import LoRAError, linears
from minilora.inject import lora_layers
from minilora.methods import AdaLoRAConfig, adalora, as_lora
from minilora.methods.adalora import AdaLoRALinear, best, penalty_gradient
from tests.conftest import ALPHA, ARCHITECTURES, State, logits, tiny_bart

OUT, IN, R = 12, 20, 6
STEPS: dict[str, Any] = {"rank": R, "target_rank": 2, "total_steps": 20, "alpha": ALPHA}


def randomize(model: nn.Module, seed: int = 1) -> None:
    """P, Q and lambda as they may be after training; lambda is zero at the start."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_A", "lora_B", "lora_E")):
                values = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                parameter.copy_(values / 2)


def make(
    dtype: torch.dtype = torch.float32, out: int = OUT, in_: int = IN, rank: int = R
) -> AdaLoRALinear:
    torch.manual_seed(0)
    layer = AdaLoRALinear(nn.Linear(in_, out).to(dtype), rank, ALPHA)
    randomize(layer)
    return layer


def adapted(architecture: str = "bart", **changes: Any) -> PreTrainedModel:
    model = ARCHITECTURES[architecture].build()
    settings = STEPS | {"targets": ARCHITECTURES[architecture].targets} | changes
    minilora.inject(model, AdaLoRAConfig(**settings))
    randomize(model)
    return model


def parts(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """P, lambda and Q in float64."""
    return tuple(p.detach().double() for p in (layer.lora_B, layer.lora_E, layer.lora_A))


# The equation -------------------------------------------------------------------------------------


@given(
    out=st.integers(1, 24), in_=st.integers(1, 24), rank=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)  # fmt: skip
def test_forward_and_delta_are_the_equation(
    out: int, in_: int, rank: int, dtype: torch.dtype
) -> None:
    layer = make(dtype, out, in_, rank).eval()
    P, lambda_, Q = parts(layer)
    delta = ALPHA / rank * P @ (lambda_ * Q)
    x = torch.randn(3, in_).to(dtype)
    expected = nn.functional.linear(
        x.double(), linears.dense_weight(layer.base).double() + delta, layer.bias.double()
    )
    # 8 units in the last place of sums of this size, which the parts' sizes bound: 1.3 occur, and
    # in bf16 the base alone is 6 or more away
    size = x.double().abs() @ (delta.abs() + linears.dense_weight(layer.base).double().abs()).T
    tolerance = 8 * torch.finfo(dtype).eps * (size + 1)
    assert ((layer(x).double() - expected).abs() <= tolerance).all()
    assert torch.allclose(layer.delta().double(), delta, rtol=1e-5, atol=1e-6)
    assert delta.abs().max() > 0


def test_it_starts_as_the_base_and_all_but_lambda_are_random() -> None:
    model = tiny_bart()
    before = logits(model)
    minilora.inject(model, AdaLoRAConfig(**STEPS))
    assert torch.equal(logits(model), before)
    for layer in lora_layers(model).values():
        assert isinstance(layer, AdaLoRALinear)
        assert not layer.lora_E.any()
        assert layer.lora_A.all()
        assert layer.lora_B.all()


def test_it_compiles_without_a_graph_break() -> None:
    layer = make().eval()
    randomize(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(3, IN)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_are_those_of_finite_differences(fused: bool) -> None:
    layer = make(torch.float64, out=4, in_=5, rank=3).train()
    layer.fused = fused
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    trained = adalora.triplets(layer)

    def loss(*_: Tensor) -> Tensor:
        return layer(x).tanh()

    assert torch.autograd.gradcheck(loss, (x, *trained))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merging_is_exact_and_so_is_its_way_back(dtype: torch.dtype) -> None:
    layer = make(dtype).eval()
    weight, x = layer.weight.clone(), torch.randn(3, IN).to(dtype)
    y = layer(x)
    wide = torch.promote_types(dtype, torch.float32)
    P, lambda_, Q = (p.to(wide) for p in (layer.lora_B, layer.lora_E, layer.lora_A))
    layer.merge()
    assert torch.equal(
        layer.weight, (weight.to(wide) + (P @ (lambda_ * Q)) * layer.scale).to(dtype)
    )
    tolerance = 16 * torch.finfo(dtype).eps * y.abs().max().item()  # 3.7 units in the last place
    assert torch.allclose(layer(x), y, atol=tolerance, rtol=0)  # occur, from the order of the sums
    assert not torch.equal(layer.weight, weight)
    layer.unmerge()
    assert torch.equal(layer.weight, weight)


def test_the_penalty_s_gradient_is_autograd_s() -> None:
    M = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    ((M.T @ M - torch.eye(3)) ** 2).sum().backward()
    assert torch.allclose(penalty_gradient(M.detach()), M.grad, rtol=1e-12)


# The step -----------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Two layers side by side: the target needs a rank of 4 in one, and is noise in the other."""

    def __init__(self, needed: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(IN, OUT), nn.Linear(IN, OUT)
        self.register_buffer("missing", torch.randn(OUT, needed) @ torch.randn(needed, IN) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.one(x), self.other(x)), dim=-1)

    def target(self, x: Tensor) -> Tensor:
        with minilora.disabled(self):
            return torch.cat((self.one(x) + x @ self.missing.T, self.other(x)), dim=-1)


def toy(**changes: Any) -> Toy:
    model = Toy()
    settings = STEPS | {"targets": ("one", "other"), "rank": 6, "target_rank": 2} | changes
    minilora.inject(model, AdaLoRAConfig(**settings), seed=0)
    return model


def loss_of(model: Toy, step: int) -> Tensor:
    x = torch.randn(32, IN, generator=torch.Generator().manual_seed(step))
    noise = torch.randn(32, 2 * OUT, generator=torch.Generator().manual_seed(-1 - step)) / 10
    loss: Tensor = ((model(x) - model.target(x) - noise) ** 2).mean()
    return loss


def adam(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(minilora.trainable_parameters(model), **{"lr": 0.02} | settings)


def train(model: Toy, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def ranks(model: nn.Module) -> list[int]:
    return [int(layer.lora_E.count_nonzero()) for layer in lora_layers(model).values()]


def test_ranks_go_where_they_are_needed() -> None:
    """A planted target: 4 ranks are missing in one layer, and the budget is 2 for each of two."""
    model = toy(total_steps=400, final_steps=100, initial_steps=50)
    first = loss_of(model, 10**6).item()
    train(model, adam(model), range(400))
    assert ranks(model) == [4, 0]
    noise = 0.01  # its variance
    assert loss_of(model, 10**6).item() - noise < 0.01 * first  # four ranks are enough


def test_the_budget_is_kept_in_every_step_and_the_choice_at_the_end() -> None:
    model = toy(total_steps=30, final_steps=10, initial_steps=4, interval=3)
    config, optimizer = minilora.config_of(model), adam(model)
    assert isinstance(config, AdaLoRAConfig)
    chosen = []
    for step in range(30):
        train(model, optimizer, range(step, step + 1))
        t = step + 1
        if t <= 4:
            assert sum(ranks(model)) == 12  # all
        elif t % 3 == 0 or t >= 20:
            assert sum(ranks(model)) == config.budget(t, 2)
        if t >= 20:
            chosen.append([layer.lora_E != 0 for layer in lora_layers(model).values()])
    assert config.budget(20, 2) == config.budget(30, 2) == 4
    assert all(torch.equal(a, b) for each in chosen for a, b in zip(each, chosen[0], strict=True))


@pytest.mark.parametrize("step", [0, 1, 10, 55, 99, 100])
def test_the_budget_is_peft_s(step: int) -> None:
    config = AdaLoRAConfig(rank=R, target_rank=2, total_steps=100, initial_steps=10, final_steps=20)
    allocator = RankAllocator.__new__(RankAllocator)
    allocator.init_bgt, allocator.target_bgt = R * 7, 2 * 7
    allocator.peft_config = peft.AdaLoraConfig(
        init_r=R, target_r=2, total_step=100, tinit=10, tfinal=20
    )
    assert config.budget(step, 7) == allocator.budget_schedule(step)[0]


@pytest.mark.parametrize("orthogonality", [0.0, 0.3])
def test_sensitivities_and_choices_are_those_of_peft_s_allocator(orthogonality: float) -> None:
    """PEFT's `RankAllocator`, called by hand after each step on the same weights and gradients."""
    ours = adapted(targets=("q_proj", "v_proj"), orthogonality=orthogonality, interval=2)
    theirs = peft.get_peft_model(
        tiny_bart(),
        peft.AdaLoraConfig(
            init_r=R, target_r=2, total_step=20, deltaT=2, target_modules=["q_proj", "v_proj"]
        ),
    )
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.adalora.AdaLoraLayer)
    }
    allocator = theirs.base_model.rankallocator
    optimizer = torch.optim.SGD(minilora.trainable_parameters(ours), lr=0.01)
    for step in range(1, 9):
        optimizer.zero_grad()
        ids = torch.randint(4, 40, (2, 6), generator=torch.Generator().manual_seed(step))
        ours(input_ids=ids, labels=ids).loss.backward()
        # what the optimizer will make of them, before anything is allocated
        copied = copy.deepcopy(ours)
        grads = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
        for name, parameter in copied.named_parameters():
            parameter.grad = grads[name].clone() if name in grads else None
        with torch.no_grad():
            for layer in lora_layers(copied).values():
                P, Q = layer.lora_B, layer.lora_A
                P.grad += orthogonality * penalty_gradient(P)
                Q.grad += orthogonality * penalty_gradient(Q.T).T
                for p in adalora.triplets(layer):
                    p -= 0.01 * p.grad
        optimizer.step()
        for name, layer in lora_layers(copied).items():
            for part in ("lora_A", "lora_B", "lora_E"):
                parameter = getattr(layers[name], part)["default"]
                parameter.data.copy_(getattr(layer, part))
                parameter.grad = getattr(layer, part).grad.clone()
        allocator.update_and_allocate(theirs.base_model.model, step)
        for name, layer in lora_layers(ours).items():
            theirs_E = layers[name].lora_E["default"]
            assert torch.equal(layer.lora_E == 0, theirs_E == 0), (step, name)
            assert torch.allclose(layer.lora_E, theirs_E, rtol=1e-5)
    for name, layer in lora_layers(ours).items():
        for part in ("lora_A", "lora_B", "lora_E"):
            state = optimizer.state[getattr(layer, part)]
            key = f"{name}.{part}.default"
            assert torch.allclose(state["sensitivity"], allocator.exp_avg_ipt[key], rtol=1e-4)
            assert torch.allclose(
                state["uncertainty"], allocator.exp_avg_unc[key], rtol=1e-3, atol=1e-9
            )
    assert 0 < sum(ranks(ours)) < R * len(layers)


@given(
    scores=st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=1, max_size=5),
    data=st.data(),
)
def test_the_best_are_the_best_and_as_many_as_the_budget(
    scores: list[list[int]], data: st.DataObject
) -> None:
    budget = data.draw(st.integers(0, 2 * len(scores)))
    kept = best([torch.tensor(one).float() for one in scores], budget)
    flat, mask = [score for one in scores for score in one], torch.cat(kept).tolist()
    assert sum(mask) == budget
    chosen = [score for score, one in zip(flat, mask, strict=True) if one]
    left = [score for score, one in zip(flat, mask, strict=True) if not one]
    assert min(chosen, default=9) >= max(left, default=0)
    expected = sorted(range(len(flat)), key=lambda i: -flat[i])[:budget]  # sorted is stable
    assert [i for i, one in enumerate(mask) if one] == sorted(expected)


def test_accumulated_gradients_are_one_step() -> None:
    whole, halves = toy(), toy()
    for model, parts_ in ((whole, 1), (halves, 4)):
        optimizer = adam(model)
        for step in range(12):
            optimizer.zero_grad()
            for _ in range(parts_):
                (loss_of(model, step) / parts_).backward()
            optimizer.step()
        states = [optimizer.state[layer.lora_E] for layer in lora_layers(model).values()]
        assert [state["allocation_steps"] for state in states] == [12, 12]
    assert ranks(whole) == ranks(halves)
    for one, two in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_steps_that_gradscaler_skips_do_not_count(fused: bool, unscale: bool) -> None:
    """A fused optimizer is called even then, and unscales by itself: both must be seen."""
    scaled, plain = toy(), toy()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer, other = adam(scaled, fused=fused), adam(plain, fused=fused)
    for step in range(10):
        for overflow in (True, False) if step in (3, 7) else (False,):
            optimizer.zero_grad()
            scaler.scale(loss_of(scaled, step) * (torch.inf if overflow else 1)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        train(plain, other, range(step, step + 1))
    assert ranks(scaled) == ranks(plain)
    assert sum(ranks(plain)) < 12
    state = optimizer.state[scaled.one.lora_E]
    assert state["allocation_steps"] == 10
    for (name, one), two in zip(scaled.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6), name
    expected = other.state[plain.one.lora_A]["sensitivity"]
    assert torch.allclose(optimizer.state[scaled.one.lora_A]["sensitivity"], expected, rtol=1e-3)


def test_a_resumed_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = toy()
    train(whole, adam(whole), range(20))
    first = toy()
    optimizer = adam(first)
    train(first, optimizer, range(9))
    torch.save([first.state_dict(), optimizer.state_dict()], tmp_path / "state")
    second = toy()
    again = adam(second)
    weights, moments = torch.load(tmp_path / "state", weights_only=True)
    second.load_state_dict(weights)
    again.load_state_dict(moments)
    train(second, again, range(9, 20))
    assert ranks(whole) == ranks(second)
    assert sum(ranks(whole)) == 4
    for one, two in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_copy_trains_by_itself_and_alike() -> None:
    model = toy()
    optimizer = adam(model)
    train(model, optimizer, range(5))
    other, before = copy.deepcopy(model), State.of(model)
    same = adam(other)
    same.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch copies no moments
    train(other, same, range(5, 20))
    before.check(model)  # nothing of it was touched
    train(model, optimizer, range(5, 20))
    assert ranks(model) == ranks(other)
    assert sum(ranks(model)) == 4
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_other_optimizers_and_dead_models_are_let_go() -> None:
    model, plain = toy(), nn.Linear(3, 3)
    other = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain(torch.ones(3)).sum().backward()
    other.step(lambda: 0.0)  # a closure, which is no concern of another optimizer
    assert "sensitivity" not in other.state[plain.weight]
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_after_unload_the_optimizer_allocates_no_more() -> None:
    model = toy()
    layer, optimizer = model.one, adam(model)
    minilora.unload(model)
    layer.lora_E.grad = torch.ones_like(layer.lora_E)
    optimizer.step()
    assert "allocation_steps" not in optimizer.state[layer.lora_E]


def test_a_closure_is_refused() -> None:
    model = toy()
    optimizer = adam(model)
    loss_of(model, 0).backward()
    with pytest.raises(LoRAError, match="without a closure"):
        optimizer.step(lambda: 0.0)


def test_a_layer_that_was_dropped_keeps_its_sensitivity() -> None:
    model = toy(total_steps=40)
    optimizer = adam(model)
    train(model, optimizer, range(3))
    before = optimizer.state[model.other.lora_A]["sensitivity"].clone()
    optimizer.zero_grad()
    model.one(torch.ones(2, IN)).sum().backward()
    optimizer.step()
    assert torch.equal(optimizer.state[model.other.lora_A]["sensitivity"], before)
    assert optimizer.state[model.one.lora_E]["allocation_steps"] == 4
    train(model, optimizer, range(4, 5))
    assert optimizer.state[model.other.lora_E]["allocation_steps"] == 5


def test_training_leaves_the_base_alone() -> None:
    model = toy()
    optimizer = adam(model)
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    with minilora.verify_training(model, optimizer) as report:
        train(model, optimizer, range(3))
    assert report.problems == []
    assert len(base) == 4
    assert all(torch.equal(model.get_parameter(name), value) for name, value in base.items())


# Files --------------------------------------------------------------------------------------------


def peft_s(directory: Path, architecture: str = "bart") -> nn.Module:
    return peft.PeftModel.from_pretrained(ARCHITECTURES[architecture].build(), directory).eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_reads_what_is_written(architecture: str, tmp_path: Path) -> None:
    ours = adapted(architecture)
    base = logits(ARCHITECTURES[architecture].build())
    with torch.no_grad():  # one module of rank 0, others of 5
        for i, layer in enumerate(lora_layers(ours).values()):
            layer.lora_E[1:2] = 0
            layer.lora_E *= int(i > 0)
    minilora.save_adapter(ours, tmp_path)
    entries = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (entries["peft_type"], entries["init_r"]) == ("ADALORA", R)
    expected = logits(ours)
    assert not torch.allclose(expected, base, atol=0.1)
    # s is the same to one rounding of float32; the order of the products is another
    tolerance = 1e-5 * expected.abs().max().item()
    assert torch.allclose(logits(peft_s(tmp_path, architecture)), expected, atol=tolerance, rtol=0)
    again = ARCHITECTURES[architecture].build()
    minilora.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), expected)
    assert minilora.config_of(again) == minilora.config_of(ours)


@pytest.mark.parametrize("pruned", [True, False])
def test_what_peft_writes_is_read(pruned: bool, tmp_path: Path) -> None:
    settings = peft.AdaLoraConfig(
        init_r=R, target_r=2, lora_alpha=ALPHA, total_step=10, tinit=1, deltaT=1,
        target_modules=["q_proj", "v_proj", "fc1"],
    )  # fmt: skip
    theirs = peft.get_peft_model(tiny_bart(), settings)
    randomize_peft(theirs)
    if pruned:
        ids = torch.arange(4, 10)[None]
        for step in range(1, 9):
            theirs(input_ids=ids, labels=ids).loss.backward()
            theirs.base_model.update_and_allocate(step)
        theirs.zero_grad()
    theirs.eval().save_pretrained(tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    sizes = {t.shape[0] for key, t in written.items() if key.endswith("lora_E")}
    assert (len(sizes) > 1) == pruned  # ranks of several sizes are in the file
    ours = tiny_bart()
    minilora.load_adapter(ours, tmp_path)
    expected = logits(theirs)
    assert not torch.allclose(expected, logits(tiny_bart()), atol=0.05)
    assert torch.allclose(logits(ours), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    config = minilora.config_of(ours)
    assert isinstance(config, AdaLoRAConfig)
    assert (config.rank, config.target_rank, config.total_steps) == (R, 2, 10)


def randomize_peft(model: nn.Module) -> None:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) / 2)


def test_the_export_is_plain_lora_with_the_same_logits(tmp_path: Path) -> None:
    ours = tiny_bart().double()  # so that the tolerance is far below what a lost rank changes
    minilora.inject(ours, AdaLoRAConfig(**STEPS, targets=ARCHITECTURES["bart"].targets))
    randomize(ours)
    with torch.no_grad():
        for i, layer in enumerate(lora_layers(ours).values()):
            layer.lora_E[torch.randperm(R)[: i % (R + 1)]] = 0
    expected, chosen = logits(ours), ranks(ours)
    assert {0, R} <= set(chosen)
    minilora.save_adapter(ours, tmp_path / "adalora")
    plain = as_lora(minilora.read_adapter(tmp_path / "adalora"))
    minilora.write_adapter(plain, tmp_path / "lora")
    assert type(plain.config) is minilora.LoRAConfig
    kept = [name for name, rank in zip(lora_layers(ours), chosen, strict=True) if rank]
    assert sorted(kept) == list(plain.modules)
    assert [plain.config.rank_of(name) for name in kept] == [rank for rank in chosen if rank]
    loaded = tiny_bart().double()
    minilora.load_adapter(loaded, tmp_path / "lora")
    assert {type(layer) for layer in lora_layers(loaded).values()} == {minilora.LoRALinear}
    # The factors are the same numbers; only a product over fewer ranks may add in another order.
    theirs = peft.PeftModel.from_pretrained(tiny_bart().double(), tmp_path / "lora").eval()
    for model in (loaded, theirs.double()):
        assert torch.allclose(logits(model), expected, rtol=0, atol=1e-11)
    assert as_lora(plain) is plain


def test_an_untrained_adapter_has_no_ranks_to_export(tmp_path: Path) -> None:
    model = tiny_bart()
    minilora.inject(model, AdaLoRAConfig(**STEPS, targets=("q_proj",)))
    minilora.save_adapter(model, tmp_path)
    with pytest.raises(LoRAError, match="every lambda of the adapter is zero"):
        as_lora(minilora.read_adapter(tmp_path))


@pytest.mark.parametrize("nulls", [{}, {"lora_alpha": None, "beta1": None, "target_r": None}])
def test_peft_s_default_target_may_be_above_the_ranks(
    nulls: dict[str, None], tmp_path: Path
) -> None:
    settings = peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=["q_proj"])
    theirs = peft.get_peft_model(tiny_bart(), settings)
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    entries = json.loads(path.read_text())
    assert entries["target_r"] == 8
    path.write_text(json.dumps(entries | nulls))
    ours = tiny_bart()
    minilora.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs.eval()), rtol=1e-5, atol=1e-5)


def test_a_model_is_merged_unwrapped_and_disabled_as_with_lora(tmp_path: Path) -> None:
    ours, base = adapted(), logits(tiny_bart())
    expected = logits(ours)
    with minilora.disabled(ours):
        assert torch.equal(logits(ours), base)
    minilora.merge(ours)
    merged = logits(ours)
    assert torch.allclose(merged, expected, atol=1e-4)
    minilora.unmerge(ours)
    assert torch.equal(logits(ours), expected)
    copied = copy.deepcopy(ours)
    assert torch.equal(logits(minilora.unwrap(copied)), merged)
    assert torch.equal(logits(minilora.unload(ours)), base)


def test_a_half_written_or_hostile_file_ends_in_one_line(tmp_path: Path) -> None:
    minilora.save_adapter(adapted(), tmp_path)
    path = tmp_path / "adapter_config.json"
    entries = json.loads(path.read_text())
    name = "model.encoder.layers.0.self_attn.q_proj.lora_E"
    for key, value, message in [
        ("init_r", R + 1, "not floating point of shape|is a torch"),
        ("init_r", 0, "init_r must be"),
        ("init_r", 10**30, "lora_"),
        ("init_r", "6", "init_r must be"),
        ("rank_pattern", {name: [True] * (R - 1)}, "rank_pattern keeps"),
        ("rank_pattern", {name: [True, False] * 3}, "rank_pattern keeps"),
        ("rank_pattern", {name: "x"}, "rank_pattern keeps"),
        ("rank_pattern", {name: 5}, "rank_pattern"),
        ("rank_pattern", 5, "rank_pattern"),
        ("rank_pattern", ["x"], "rank_pattern"),
        ("lora_alpha", "7", "lora_alpha must be"),
        ("total_step", None, "total_steps must be"),
        ("target_r", R + 1, "target_rank 7 is above"),
        ("use_rslora", True, "rslora does not go with AdaLoRA"),
        ("beta1", 1.5, "beta1 must be in"),
        ("tinit", 20, "must be less than total_steps"),
        ("tinit", -1, "initial_steps must be"),
        ("orth_reg_weight", float("nan"), "orthogonality must be"),
        ("peft_type", "LORA", "minilora does not do this"),
    ]:
        path.write_text(json.dumps(entries | {key: value}))
        with pytest.raises(LoRAError, match=message) as raised:
            minilora.read_adapter(tmp_path)
        assert "\n" not in str(raised.value), key


def test_a_lora_file_with_lambdas_is_refused(tmp_path: Path) -> None:
    minilora.save_adapter(adapted(), tmp_path)
    adapter = minilora.read_adapter(tmp_path)
    with pytest.raises(LoRAError, match="lora_E: the configuration asks for no adalora"):
        minilora.Adapter(minilora.LoRAConfig(rank=R), adapter.tensors)
    with pytest.raises(LoRAError, match="cannot combine"):
        minilora.combine([adapter], [1.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_steps": 0}, "total_steps must be a whole number"),
        ({"target_rank": 7}, "target_rank 7 is above the rank, 6"),
        ({"initial_steps": 10, "final_steps": 10}, "must be less than total_steps"),
        ({"rslora": True}, "rslora does not go with AdaLoRA"),
        ({"dora": True}, "dora does not go with AdaLoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern does not go with AdaLoRA"),
        ({"init": "gaussian"}, "init 'gaussian' does not go"),
        ({"init": "pissa"}, "init 'pissa' does not go"),
        ({"interval": 0}, "interval must be a whole number"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\)"),
        ({"final_steps": 0.5}, "final_steps must be a whole number of at least 0, not 0.5"),
        ({"initial_steps": True}, "initial_steps must be a whole number of at least 0, not True"),
        ({"orthogonality": -1}, "orthogonality must be"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LoRAError, match=message):
        AdaLoRAConfig(**STEPS | changes)
