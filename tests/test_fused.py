"""The hand-written backward against finite differences, the eager line, and PEFT's saved bytes."""

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import minilora
from minilora import LoRALinear
from minilora.functional import low_rank
from minilora.fused import CASTS, CHANGED, fused_low_rank, keep_mask
from minilora.methods.dora import DoRALinear
from tests.marks import slow_but
from tests.test_functional import SCALE, operands

NODE = "LowRankBackward"


def by_bernoulli(x: Tensor, p: float) -> Tensor:
    """The mask that F.dropout would draw from the same seed on a CPU."""
    return torch.empty(x.shape, dtype=torch.uint8).bernoulli_(1 - p)


def grown(seed: int = 0, dropout: float = 0.0, sizes: tuple[int, int] = (6, 5)) -> LoRALinear:
    """A training layer whose B is not zero."""
    torch.manual_seed(seed)
    layer = LoRALinear(nn.Linear(*sizes), rank=3, alpha=7, dropout=dropout).train()
    nn.init.normal_(layer.lora_B)
    return layer


def gradients(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    (output * torch.arange(1, output.numel() + 1).view(output.shape)).sum().backward()
    return output.detach(), [leaf.grad for leaf in leaves]


# The backward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_the_gradients_are_those_of_finite_differences(
    batch: tuple[int, ...], dropout: float
) -> None:
    def seeded(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        output = fused_low_rank(*tensors, SCALE, dropout)
        assert output.grad_fn.name() == NODE
        return output

    arguments = [tensor.requires_grad_() for tensor in operands(*batch)]
    assert torch.autograd.gradcheck(seeded, arguments)


@given(
    st.lists(st.integers(0, 3), max_size=3),
    *(st.integers(1, high) for high in (9, 9, 4)),
    st.sampled_from([0.0, 0.3]),
)
def test_it_is_the_eager_line_in_value_and_gradients(
    batch: list[int], out: int, in_: int, rank: int, dropout: float
) -> None:
    tensors = operands(*batch, out=out, in_=in_, rank=rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minilora.fused.keep_mask", by_bernoulli)
        results = []
        for function in (low_rank, fused_low_rank):
            torch.manual_seed(5)
            results.append(gradients(lambda *t, f=function: f(*t, SCALE, dropout), *tensors))
    # float64: the same sums in another order, of at most 81 products of order 100
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("frozen", range(4), ids=["y", "x", "A", "B"])
def test_no_gradient_is_computed_where_none_is_needed(frozen: int) -> None:
    tensors = [t.requires_grad_(i != frozen) for i, t in enumerate(operands(4))]
    whole = [t.detach().clone().requires_grad_() for t in tensors]
    products = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None):
            products.append(op) if op is torch.ops.aten.mm.default else None
            return op(*args, **kwargs or {})

    counts = []
    for arguments in (whole, tensors):
        output = fused_low_rank(*arguments, SCALE)
        with Count():
            output.sum().backward()
        counts.append(len(products))
        products.clear()
    assert counts == [4, 4 if frozen == 0 else 3]
    assert tensors[frozen].grad is None
    for i in {0, 1, 2, 3} - {frozen}:
        assert torch.equal(tensors[i].grad, whole[i].grad)


class Widened(nn.Linear):
    """A base whose output has another dtype than its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


def test_a_y_of_another_dtype_is_added_to_as_the_eager_line_does() -> None:
    layer, x = LoRALinear(Widened(6, 5), rank=3, alpha=7).train(), torch.randn(4, 6)
    nn.init.normal_(layer.lora_B)
    mixed = layer(x)
    assert torch.equal(mixed, low_rank(layer.base(x), x, layer.lora_A, layer.lora_B, layer.scale))
    assert not torch.equal(mixed, layer.base(x))
    assert mixed.dtype == torch.float64
    assert mixed.grad_fn.name() != NODE


@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_draws_the_same_mask(no_gradients: Any) -> None:
    layer, outputs = grown(dropout=0.5), []
    for context in (no_gradients, torch.enable_grad):
        torch.manual_seed(1)
        with context(), torch.autocast("cpu", torch.bfloat16):
            outputs.append(layer(torch.ones(4, 6)))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_second_derivatives_are_those_of_finite_differences(dropout: float) -> None:
    def seeded(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return fused_low_rank(*tensors, SCALE, dropout)

    arguments = [tensor.requires_grad_() for tensor in operands(2, 3)]
    assert torch.autograd.gradgradcheck(seeded, arguments)


# The mask -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.999])
def test_the_mask_drops_the_right_share_each_element_for_itself(p: float) -> None:
    torch.manual_seed(0)
    kept = keep_mask(torch.empty(1000, 401), p).double()
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    deviation = (p * (1 - p)) ** 0.5
    # 401,000 draws: five standard deviations and the 1/131,072 by which p may be rounded
    assert kept.mean().item() == pytest.approx(1 - p, abs=5 * deviation / 401_000**0.5 + 1e-5)
    for one, other in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1])):  # neighbours
        together = (one * other).mean().item()
        assert together == pytest.approx((1 - p) ** 2, abs=8 * deviation / 400_000**0.5 + 2e-5)


def test_the_mask_repeats_with_the_seed_in_any_shape() -> None:
    for shape in ((), (0,), (1,), (7,), (3, 5), (2, 0, 3)):
        torch.manual_seed(1)
        first, second = keep_mask(torch.empty(shape), 0.5), keep_mask(torch.empty(shape), 0.5)
        torch.manual_seed(1)
        assert torch.equal(keep_mask(torch.empty(shape), 0.5), first)
        assert first.shape == second.shape == shape
    assert not torch.equal(keep_mask(torch.empty(99), 0.5), keep_mask(torch.empty(99), 0.5))


def test_the_expectation_stays() -> None:
    torch.manual_seed(0)
    x, A, B = torch.ones(20_000, 4), torch.eye(4), torch.eye(4, requires_grad=True)
    branch = fused_low_rank(torch.zeros(20_000, 4), x, A, B, 1.0, 0.3).detach()
    assert branch.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert branch.mean().item() == pytest.approx(1, abs=0.0093)  # four standard deviations


# The layer ----------------------------------------------------------------------------------------


def test_training_is_fused_evaluation_is_not_and_there_is_a_switch() -> None:
    layer, x = grown(), torch.randn(2, 3, 6)
    assert layer(x).grad_fn.name() == NODE
    torch.testing.assert_close(layer(x), layer.eval()(x))
    assert layer(x).grad_fn.name() != NODE
    layer.train().fused = False
    assert layer(x).grad_fn.name() != NODE
    assert torch.equal(layer(x), layer.eval()(x))


def model(dropout: float, fused: bool) -> nn.Sequential:
    layers = [grown(seed, dropout, (24, 24)) for seed in range(3)]
    for layer in layers:
        layer.fused = fused
    return nn.Sequential(layers[0], nn.Tanh(), nn.LayerNorm(24), layers[1], nn.Tanh(), layers[2])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 2e-5),  # 50 steps of rounding at 6e-8 a sum, amplified by Adam
        (torch.bfloat16, 2e-2),  # a rounding is 4e-3
    ],
)
def test_fifty_steps_lose_as_the_eager_path_does(
    dtype: torch.dtype, tolerance: float, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minilora.fused.keep_mask", by_bernoulli)  # the same masks
    losses: dict[bool, list[float]] = {}
    for fused in (False, True):
        network = model(dropout, fused)
        optimizer = torch.optim.AdamW(minilora.trainable_parameters(network), lr=1e-3)
        draw = torch.Generator().manual_seed(1)
        x = torch.randn(4, 8, 24, generator=draw)
        target = torch.randn(4, 8, 24, generator=draw)
        torch.manual_seed(2)
        losses[fused] = []
        for _ in range(50):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                output = network(x)
            assert (output.grad_fn.name() == NODE) is fused
            loss = nn.functional.mse_loss(output.float(), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[fused].append(loss.item())
    assert losses[True][-1] < 0.8 * losses[True][0]  # it learns
    assert losses[True] == pytest.approx(losses[False], rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_computes_in_its_dtype_and_trains_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 6)
    found: list[tuple[Tensor, ...]] = []
    for fused in (True, False):
        layer, leaf = grown(), x.clone().requires_grad_()
        layer.fused = fused
        with torch.autocast("cpu", dtype):
            output = layer(leaf)
        assert output.dtype == dtype
        output.float().square().sum().backward()
        found.append((output.float(), leaf.grad, layer.lora_A.grad, layer.lora_B.grad))
    for one, other in zip(*found, strict=True):
        assert one.dtype == torch.float32
        # a rounding of bf16 is 4e-3 of the largest number that takes part in a sum
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * other.abs().max().item())


def test_a_backward_inside_autocast_computes_as_the_forward_did() -> None:
    results = []
    for inside in (False, True):
        layer = grown()
        loss = layer(torch.ones(3, 6)).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
        results.append(layer.lora_B.grad)
    assert torch.equal(*results)


# What is saved ------------------------------------------------------------------------------------


@contextmanager
def saved_bytes(skip: nn.Module) -> Iterator[Callable[[], int]]:
    """Bytes that autograd keeps for a backward, each storage once, without parameters."""
    storages: dict[int, tuple[int, Tensor]] = {}
    known = {p.untyped_storage().data_ptr() for p in skip.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(size for size, _ in storages.values())


class Attention(nn.Module):
    """Only what reads x."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + self.v_proj(x)


def bytes_of(attention: nn.Module, dtype: torch.dtype) -> int:
    x = torch.randn(4, 32, 64, dtype=dtype, requires_grad=True)
    with saved_bytes(attention) as count, torch.autocast("cpu", torch.bfloat16):
        attention.train()(x)
        return count()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_q_and_v_save_at_most_two_fifths_of_what_peft_saves(dtype: torch.dtype) -> None:
    names = ["q_proj", "v_proj"]
    theirs = bytes_of(
        peft.get_peft_model(
            Attention().bfloat16(), peft.LoraConfig(r=4, target_modules=names, lora_dropout=0.1)
        ),
        dtype,
    )
    ours = {}
    for dropout in (0.1, 0.0):
        attention = Attention().bfloat16()
        minilora.inject(attention, minilora.LoRAConfig(rank=4, targets=names, dropout=dropout))
        ours[dropout] = bytes_of(attention, dtype)
    elements, small = 4 * 32 * 64, 2 * (4 * 32 * 4 + 2 * 4 * 64) * 2  # h, A and B, twice, in bf16
    assert theirs >= 12 * elements  # fp32 noise and a bf16 copy, for each of the two
    assert ours == {0.1: (2 + 1 + 1) * elements + small, 0.0: 2 * elements + small}
    assert ours[0.1] <= 0.4 * theirs


def test_readers_of_one_input_share_its_cast_until_it_changes() -> None:
    q, v, x = grown(0), grown(1), torch.randn(4, 6)

    def cast(layer: LoRALinear) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(x)  # with it goes what it saved
        return output.grad_fn.saved_tensors[0]

    with torch.autocast("cpu", torch.bfloat16):
        one = q(x)
    assert cast(v).data_ptr() == one.grad_fn.saved_tensors[0].data_ptr()
    with torch.autocast("cpu", torch.float16):
        other = v(x)
    assert other.grad_fn.saved_tensors[0].dtype == torch.float16
    x.add_(1)
    assert torch.equal(cast(v), x.bfloat16())
    del one, other
    assert CASTS[x][1]() is None  # kept for no longer than a backward needs it


def test_a_cast_is_not_taken_for_that_of_a_copy_or_of_new_data() -> None:
    layer, x = grown(), torch.randn(4, 6)
    x.add_(1).mul_(2)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)  # its cast stays
        copied = copy.deepcopy(x).mul_(7)  # at the version that x has had
        assert torch.equal(layer(copied), layer(copied.clone()))
        torch.save(x, io.BytesIO())  # x is as it was, and can be pickled
        x.data = x.data * 5
        assert torch.equal(layer(x), layer(x.clone()))
    assert not torch.equal(layer(x), output)


@pytest.mark.parametrize("kind", ["nested", "sparse"])
def test_nested_and_sparse_inputs_train_by_the_plain_line(kind: str) -> None:
    found = []
    for fused in (True, False):
        layer = grown()
        layer.fused = fused
        rows = torch.randn(5, 6, generator=torch.manual_seed(1))
        if kind == "sparse":
            y = layer(rows.to_sparse())
        else:
            y = layer(torch.nested.nested_tensor([rows[:2], rows[2:]], layout=torch.jagged))
            y = y.values()
        y.square().sum().backward()
        found.append((y.detach(), layer.lora_A.grad, layer.lora_B.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
        assert one.any()


def test_the_hint_belongs_to_inputs_changed_in_place_only() -> None:
    y = grown()(torch.randn(4, 6)).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time") as error:
        y.backward()
    assert CHANGED not in str(error.value)


@pytest.mark.parametrize("p", [1 - 2**-10, 1 - 2**-16, 1 - 2**-17, 1 - 2**-20])
def test_dropout_near_one_drops(p: float) -> None:
    """Of 2^20 elements 2^20 (1 - p) are kept on average, here within six standard deviations."""
    torch.manual_seed(0)
    kept, mean = int(keep_mask(torch.empty(1024, 1024), p).sum()), 2**20 * (1 - p)
    assert abs(kept - mean) <= 6 * mean**0.5


# What models do to a layer's input and output -----------------------------------------------------

Used = Callable[[nn.Module, Tensor], Any]
USES: dict[str, Used] = {}


def use(function: Used) -> Used:
    USES[function.__name__] = function
    return function


def backward(layer: nn.Module, x: Tensor, output: Tensor) -> list[Tensor | None]:
    """The output, the loss and every gradient, each element with a weight of its own."""
    weights = torch.arange(1, output.numel() + 1, dtype=output.dtype).view(output.shape)
    (output.square() * weights).sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


@use
def relu_in_place(layer: nn.Module, x: Tensor) -> Any:
    return backward(layer, x, nn.ReLU(inplace=True)(layer(x)))


@use
def arithmetic_in_place(layer: nn.Module, x: Tensor) -> Any:
    y = layer(x)
    y *= 0.3
    y /= 7
    y[..., 1] += 2
    y.masked_fill_(y > 0.5, -1)
    return backward(layer, x, y)


@use
def written_to_through_a_view(layer: nn.Module, x: Tensor) -> Any:
    y = layer(x)
    y.view(-1, 5)[:, 2:].mul_(3)
    return backward(layer, x, y)


@use
def written_to_without_a_gradient(layer: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return layer(x).mul_(2).view(-1)


@use
def heads_split(layer: nn.Module, x: Tensor) -> Any:
    y = layer(x)
    return backward(layer, x, y.view(*y.shape[:-1], 5, 1).transpose(-3, -2).contiguous())


@use
def parts_detached(layer: nn.Module, x: Tensor) -> Any:
    y = layer(x)
    return backward(layer, x, y + y.detach() * layer(x.detach()))


@use
def output_detached_in_place(layer: nn.Module, x: Tensor) -> Any:
    return layer(x).detach_().requires_grad_()


@use
def input_not_asking(layer: nn.Module, x: Tensor) -> Any:
    return backward(layer, x, layer(x.detach()))


@use
def input_expanded(layer: nn.Module, x: Tensor) -> Any:
    return backward(layer, x, layer(x[:1].expand(4, *x.shape[1:])))


@use
def input_not_contiguous(layer: nn.Module, x: Tensor) -> Any:
    return backward(layer, x, layer(x.transpose(0, 1).contiguous().transpose(0, 1)))


@use
def input_a_slice(layer: nn.Module, x: Tensor) -> Any:
    return backward(layer, x, layer(torch.cat([x, x], -1)[..., ::2]).mul_(2))


@use
def input_one_row(layer: nn.Module, x: Tensor) -> Any:
    return backward(layer, x, layer(x[0, 0]).mul_(2))


@use
def no_rows(layer: nn.Module, x: Tensor) -> Any:
    return backward(layer, x, layer(x[:0]).relu_())


@use
def output_not_used(layer: nn.Module, x: Tensor) -> Any:
    return backward(layer, x, layer(x) * 0 + x.sum())


@use
def gradient_expanded(layer: nn.Module, x: Tensor) -> Any:
    layer(x).sum().backward()
    return [x.grad, layer.lora_A.grad, layer.lora_B.grad]


@use
def backward_twice(layer: nn.Module, x: Tensor) -> Any:
    y = layer(x)
    y.sum().backward(retain_graph=True)
    return backward(layer, x, y)


@use
def hooks(layer: nn.Module, x: Tensor) -> Any:
    layer.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    layer.register_forward_hook(lambda _, args, y: y.mul_(3))
    seen: list[Tensor] = []
    y = layer(x)
    y.register_hook(lambda G: seen.append(G) or G * 2)
    return backward(layer, x, y * 1) + seen


@use
def backward_hook(layer: nn.Module, x: Tensor) -> Any:
    layer.register_full_backward_hook(lambda _, dx, dy: (dx[0] * 2,))
    return backward(layer, x, layer(x))


@use
def checkpointed(layer: nn.Module, x: Tensor) -> Any:
    return backward(layer, x, checkpoint(lambda x: layer(x).relu_(), x, use_reentrant=False) * 1)


@use
def checkpointed_with_reentrance(layer: nn.Module, x: Tensor) -> Any:
    return backward(layer, x, checkpoint(lambda x: layer(x).relu_(), x, use_reentrant=True) * 1)


@use
def compiled(layer: nn.Module, x: Tensor) -> Any:
    torch.compiler.reset()
    whole = torch.compile(lambda x: layer(x).relu_(), fullgraph=True, backend="aot_eager")
    return backward(layer, x, whole(x))


@use
def exported(layer: nn.Module, x: Tensor) -> Any:
    return torch.export.export(layer, (x,)).module()(x)


@use
def vmap(layer: nn.Module, x: Tensor) -> Any:
    return backward(layer, x, torch.func.vmap(layer)(x))


def as_function(layer: nn.Module) -> tuple[dict[str, Tensor], Callable[..., Tensor]]:
    held = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(held: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, held, (x,)).pow(3).sum()

    return held, loss


@use
def gradient_of_a_function(layer: nn.Module, x: Tensor) -> Any:
    held, loss = as_function(layer)
    return list(torch.func.grad(loss)(held, x.detach()).values())


@use
def gradients_of_each_example(layer: nn.Module, x: Tensor) -> Any:
    held, loss = as_function(layer)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))
    return list(each(held, x.detach()).values())


@use
def jacobians(layer: nn.Module, x: Tensor) -> Any:
    rows = x.detach()[0]
    return [torch.func.jacrev(layer)(rows), torch.func.jacfwd(layer)(rows)]


@use
def jacobian_by_batched_gradients(layer: nn.Module, x: Tensor) -> Any:
    return torch.autograd.functional.jacobian(layer, x.detach(), vectorize=True)


@use
def hessian(layer: nn.Module, x: Tensor) -> Any:
    _, loss = as_function(layer)
    return torch.func.hessian(lambda x: loss({}, x))(x.detach()[0])


@use
def forward_mode(layer: nn.Module, x: Tensor) -> Any:
    with torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x)))
        return list(torch.autograd.forward_ad.unpack_dual(y))


@use
def gradient_penalty(layer: nn.Module, x: Tensor) -> Any:
    y = layer(x).square()
    asked = [x, layer.lora_A, layer.lora_B]
    first = torch.autograd.grad(y.sum(), asked, create_graph=True)
    (y.sum() + sum(g.pow(2).sum() for g in first)).backward()
    return [*first, *(t.grad for t in asked)]


BASES: dict[str, Callable[..., nn.Module]] = {
    "linear": lambda out=5: LoRALinear(nn.Linear(64, out), rank=3, alpha=7),
    "nf4": lambda out=5: LoRALinear(minilora.NF4Linear(nn.Linear(64, out)), rank=3, alpha=7),
    "dora": lambda out=5: DoRALinear(nn.Linear(64, out), rank=3, alpha=7),
}


def outcome(function: Used, base: str, fused: bool, dtype: torch.dtype | None) -> Any:
    torch.manual_seed(0)
    layer = BASES[base]().train()
    nn.init.normal_(layer.lora_B)
    layer.fused = fused
    x = torch.randn(2, 3, 64, requires_grad=True)
    try:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return function(layer, x)
    except Exception as error:
        return error


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", slow_but(USES.keys() - {"compiled"}, USES))
def test_whatever_works_on_the_eager_line_works_fused(
    name: str, base: str, dtype: torch.dtype | None
) -> None:
    wanted, found = (outcome(USES[name], base, fused, dtype) for fused in (False, True))
    if isinstance(wanted, Exception):  # then both lines are refused alike
        assert (name, base) == ("exported", "dora"), wanted
        assert type(found) is type(wanted), found
        return
    if isinstance(found, Exception):
        raise found
    wanted, found = (list(r) if isinstance(r, list | tuple) else [r] for r in (wanted, found))
    assert len(found) == len(wanted) > 0
    assert any(t is not None for t in wanted)
    unit = 2e-5 if dtype is None else 0.03  # some roundings, 6e-8 and 4e-3, of the largest number
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) is (other is None)
        if other is not None:
            top = other.detach().abs().max().item() if other.numel() else 0.0
            torch.testing.assert_close(one, other, rtol=0, atol=unit * top)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("base", BASES)
def test_an_input_that_the_output_is_added_to_in_place_trains_right_or_is_refused(
    base: str, dtype: torch.dtype | None, dropout: float
) -> None:
    """`x += layer(x)` of a square layer. In float32 the backward pass reads x itself."""
    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        layer = BASES[base](64).train()
        nn.init.normal_(layer.lora_B)
        layer.dropout = dropout
        start = torch.randn(2, 3, 64, requires_grad=True)
        torch.manual_seed(1)  # the same mask
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            x = start * 1
            y = layer(x)
            x = x.add_(y) if in_place else x + y
        saves_x = dtype is None and (base, dropout) != ("dora", 0.4)  # or what dropout leaves
        if in_place and saves_x:
            with pytest.raises(RuntimeError, match="modified by an inplace operation") as error:
                backward(layer, start, x)
            assert (CHANGED in str(error.value)) is (base != "dora")  # its error has no hint
            return
        found.append(backward(layer, start, x))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert all(grad.any() for grad in found[1])


def test_under_autocast_a_second_derivative_reaches_x_through_its_cast() -> None:
    """q, then v on the cast that q left behind, first of all without a graph."""
    found = []
    for fused in (False, True):
        q, v, x = grown(0), grown(1), torch.randn(4, 6, generator=torch.manual_seed(4))
        q.fused = v.fused = fused
        x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                kept = q(x), x.bfloat16()
            y = q(x).float().pow(3).sum() + v(x).float().pow(2).sum()
        first = torch.autograd.grad(y, [v.lora_A, q.lora_B], create_graph=True)
        (second,) = torch.autograd.grad(sum(g.square().sum() for g in first), x)
        found.append(second)
        del kept
    assert found[0].abs().max() > 1
    # a rounding of bf16 is 4e-3 of the largest number that takes part in a sum
    torch.testing.assert_close(*found, rtol=0, atol=0.02 * found[0].abs().max().item())


# Company ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    results = []
    for again in (False, True):
        network, x = model(0.1, True), torch.randn(3, 24, generator=torch.manual_seed(4))
        x.requires_grad_()
        torch.manual_seed(5)
        output = checkpoint(network, x, use_reentrant=reentrant) if again else network(x)
        output.square().sum().backward()
        results.append([x.grad, *(p.grad for p in minilora.trainable_parameters(network))])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_model_on_the_meta_device_trains_in_shapes(dropout: float, quantized: bool) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 8))
    if quantized:
        minilora.quantize(model)
    config = minilora.LoRAConfig(rank=2, alpha=4, dropout=dropout, targets="all-linear")
    minilora.inject(model, config)
    x = torch.empty(3, 64, device="meta", requires_grad=True)
    y = model.train()(x)
    assert y.is_meta
    assert y.shape == (3, 8)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all(p.grad.shape == p.shape for p in trained)


@pytest.mark.parametrize("dropout", slow_but([0.0], [0.0, 0.1]))
def test_the_compiler_takes_it_whole(dropout: float) -> None:
    """`fullgraph`: a graph break would raise. What Inductor makes of the graph is its affair."""
    network, x = model(dropout, True), torch.randn(2, 3, 24)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        output = compiled(x)
    output.float().square().sum().backward()
    found = [p.grad.clone() for p in minilora.trainable_parameters(network)]
    assert all(gradient.any() for gradient in found)
    if not dropout:
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            network(x).float().square().sum().backward()
        for one, parameter in zip(found, minilora.trainable_parameters(network), strict=True):
            # The same kernels, and equal where this was tried. Gradients are 30 to 1,500, and
            # bf16 rounds a sum by 1/256.
            torch.testing.assert_close(one, parameter.grad, rtol=0.02, atol=0.2)


def test_under_ddp_the_gradients_are_the_same(tmp_path: Path) -> None:
    network, x = model(0.0, True), torch.randn(2, 24)
    network(x).square().sum().backward()
    alone = [p.grad.clone() for p in minilora.trainable_parameters(network)]
    network.zero_grad()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        nn.parallel.DistributedDataParallel(network)(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(map(torch.equal, alone, (p.grad for p in minilora.trainable_parameters(network))))


class Fourfold(nn.Module):
    """A base of another kind, whose dense weight exists only while it computes."""

    in_features, out_features, mergeable = 24, 24, False

    def __init__(self) -> None:
        super().__init__()
        codes = torch.randint(-8, 8, (24, 24), dtype=torch.int8, generator=torch.manual_seed(0))
        self.register_buffer("codes", codes)

    def dense_weight(self) -> Tensor:
        return self.codes / 4

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x @ self.dense_weight().to(x.dtype).T


def test_any_base_serves_and_nothing_of_it_is_saved() -> None:
    layer = LoRALinear(Fourfold(), rank=3, dropout=0.1).train()
    output = layer(torch.randn(5, 24))
    assert output.grad_fn.name() == NODE
    saved = [t for t in output.grad_fn.saved_tensors if t is not layer.lora_B]
    shapes = sorted({t.data_ptr(): tuple(t.shape) for t in saved}.values())
    assert shapes == [(3, 24), (5, 3), (5, 24), (5, 24), (24, 3)]  # A, h, x, mask, t B
