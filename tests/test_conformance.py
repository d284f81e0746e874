"""The kit finds what is planted, by the invariant meant for it, and lets what is right pass."""

import importlib.util
import json
import pickle
import sys
import unittest
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import minilora
from minilora import LoRALinear, conformance
from minilora.__main__ import main
from tests.forks import fork
from tests.marks import slow_but
from tests.test_architecture import code_lines, imports

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples" / "conformance"
HOOKS = {"merge": minilora.merge, "unmerge": minilora.unmerge}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Student: Any = example("student").LoRA
"""A right layer: `base`, `A`, `B`, `scale`, `dropout`, `kept`. Every fault changes one thing."""


# Faults -------------------------------------------------------------------------------------------
# Each is (the invariant meant for it, the others that notice too).

FAULTS: dict[str, tuple[type[nn.Module], str, set[str]]] = {}


def fault(meant: str, *others: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def note(kind: type[nn.Module]) -> type[nn.Module]:
        FAULTS[kind.__name__] = (kind, meant, set(others))
        return kind

    return note


class Changed(Student):
    """A student's layer with an `after` for what is changed once it is built."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(base, rank, alpha, dropout)
        self.rank, self.alpha = rank, alpha
        with torch.no_grad():
            self.after()

    def after(self) -> None:
        pass

    def branch(self, x: Tensor) -> Tensor:
        return self.scale * (self.dropout(x) @ self.A.T @ self.B.T)

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is not None:
            return super().forward(x)
        return self.base(x) + self.branch(x)

    def update(self) -> Tensor:
        return self.scale * self.B @ self.A


@fault("learns", "start")
class BothZero(Changed):
    def after(self) -> None:
        self.A.zero_()


@fault("start", "dropout")
class BothRandom(Changed):
    def after(self) -> None:
        self.B.normal_()


@fault("scale")
class AlphaForgotten(Changed):
    def after(self) -> None:
        self.scale = 1 / self.rank


@fault("scale")
class RForgotten(Changed):
    def after(self) -> None:
        self.scale = self.alpha


@fault("scale")
class ScaleSquared(Changed):
    def after(self) -> None:
        self.scale = self.scale**2


@fault("scale")
class TwiceTheScale(Changed):
    def after(self) -> None:
        self.scale = 2 * self.scale


@fault("dropout")
class DropoutInEvaluation(Changed):
    def branch(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout.p, training=True)
        return self.scale * (x @ self.A.T @ self.B.T)


@fault("dropout")
class DropoutOnTheBase(Changed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.dropout(x) if self.kept is None else x)


@fault("dropout")
class DropoutNotRescaled(Changed):
    def branch(self, x: Tensor) -> Tensor:
        keep = torch.rand_like(x) >= self.dropout.p if self.training else torch.ones_like(x)
        return self.scale * ((x * keep.to(x.dtype)) @ self.A.T @ self.B.T)


@fault("dropout")
class DropoutForgotten(Changed):
    def branch(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.A.T @ self.B.T)


@fault("frozen", "parameters")
class BaseNotFrozen(Changed):
    def after(self) -> None:
        self.base.requires_grad_(True)


@fault("frozen", "parameters")
class BiasTrains(Changed):
    def after(self) -> None:
        self.base.bias.requires_grad_(True)


@fault("frozen", "parameters")
class BaseDecays(Changed):
    """It is detached, so that it gets no gradient, but it is still in the optimizer."""

    def after(self) -> None:
        self.base.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is not None:
            return super().forward(x)
        W, b = self.base.weight, self.base.bias
        return F.linear(x, W.detach() + 0 * W, b.detach()) + self.branch(x)


@fault("parameters", "scale")
class ScaleTrains(Changed):
    def after(self) -> None:
        self.scale = nn.Parameter(torch.tensor(self.scale))


@fault("parameters", "learns")
class ADoesNotTrain(Changed):
    def after(self) -> None:
        self.A.requires_grad_(False)


@fault("learns", "gradients", "dropout")
class BranchDetached(Changed):
    """A never gets a gradient."""

    def branch(self, x: Tensor) -> Tensor:
        return self.scale * ((self.dropout(x) @ self.A.T).detach() @ self.B.T)


@fault("scale")
class ATransposed(Changed):
    """A (r, in) is read as (in, r), which has as many numbers and runs."""

    def branch(self, x: Tensor) -> Tensor:
        return self.scale * (self.dropout(x) @ self.A.reshape(-1, self.rank) @ self.B.T)

    def update(self) -> Tensor:
        return self.scale * self.B @ self.A.reshape(-1, self.rank).T

    @torch.no_grad()
    def merge(self) -> None:
        if self.kept is None:
            self.kept = self.base.weight.clone()
            self.base.weight += self.update()


class Scaled(torch.autograd.Function):
    """s (x A^T) B^T, with a backward that forgets s in dL/dA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.s = s
        return s * (x @ A.T) @ B.T

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B = ctx.saved_tensors
        flat, g = x.reshape(-1, x.shape[-1]), G.reshape(-1, G.shape[-1])
        return ctx.s * (G @ B) @ A, (g @ B).T @ flat, ctx.s * g.T @ (flat @ A.T), None


@fault("gradients", "dropout")
class BackwardForgetsTheScale(Changed):
    def branch(self, x: Tensor) -> Tensor:
        x, A, B = self.dropout(x), self.A, self.B
        if torch.is_autocast_enabled("cpu"):
            x, A, B = (t.bfloat16() for t in (x, A, B))
        return Scaled.apply(x, A, B, self.scale)


@fault("rank", "learns", "dropout", "merge")
class ReluBetween(Changed):
    def branch(self, x: Tensor) -> Tensor:
        return self.scale * ((self.dropout(x) @ self.A.T).relu() @ self.B.T)


@fault("rank", "scale", "learns", "merge")
class FullRank(Changed):
    """B A and its absolute value: an update that A and B cannot express."""

    def branch(self, x: Tensor) -> Tensor:
        BA = self.B @ self.A
        return self.scale * (self.dropout(x) @ (BA + BA.abs()).T)


@fault("merge")
class MergeRoundsTwice(Changed):
    @torch.no_grad()
    def merge(self) -> None:
        if self.kept is None:
            self.kept = self.base.weight.clone()
            self.base.weight += self.update().to(self.base.weight.dtype)


@fault("merge")
class MergeForgetsTheScale(Changed):
    @torch.no_grad()
    def merge(self) -> None:
        if self.kept is None:
            self.kept = self.base.weight.clone()
            self.base.weight += self.B @ self.A


@fault("merge")
class MergeReplacesTheStorage(Changed):
    @torch.no_grad()
    def merge(self) -> None:
        if self.kept is None:
            self.kept = self.base.weight.clone()
            merged = (self.base.weight + self.update()).to(self.kept.dtype)
            self.base.weight = nn.Parameter(merged, requires_grad=False)


@fault("merge", "unmerge")
class MergeChangesTheBias(Changed):
    @torch.no_grad()
    def merge(self) -> None:
        if self.kept is None:
            super().merge()
            self.base.bias += 1


@fault("merge", "merge twice", "unmerge")
class MergeSubtracts(Changed):
    """`-=` where `+=` is meant, and unmerging to go with it."""

    @torch.no_grad()
    def merge(self) -> None:
        self.base.weight -= self.update()
        self.kept = 1

    @torch.no_grad()
    def unmerge(self) -> None:
        self.base.weight += self.update()
        self.kept = None


@fault("unmerge")
class UnmergeSubtracts(Changed):
    @torch.no_grad()
    def unmerge(self) -> None:
        if self.kept is not None:
            self.base.weight -= self.update()
            self.kept = None


@fault("unmerge")
class UnmergeFromHalfPrecision(Changed):
    @torch.no_grad()
    def unmerge(self) -> None:
        if self.kept is not None:
            self.base.weight.copy_(self.kept.half())
            self.kept = None


@fault("merge twice")
class MergesTwice(Changed):
    @torch.no_grad()
    def merge(self) -> None:
        self.kept = self.base.weight.clone() if self.kept is None else self.kept
        self.base.weight += self.update()


@fault("latency", "train merged", "merge")
class StillRunsTheBranch(Changed):
    """Merged, the update is added a second time."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.branch(x)


@fault("latency")
class BuildsTheWeightAnew(Changed):
    """Merging is only remembered: W + s B A is computed at every call all the same."""

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            return super().forward(x)
        return F.linear(x, self.kept + self.update(), self.base.bias)


@fault("train merged")
class TrainsWhileMerged(Changed):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.kept is not None else super().forward(x)


@fault("state dict")
class StateDictDropsB(Changed):
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in state.items() if name != "B"}


@fault("state dict")
class LoadsNothing(Changed):
    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        pass


@fault("deep copy")
class CopySharesItsParameters(Changed):
    def __deepcopy__(self, memory: dict[int, Any]) -> nn.Module:
        other = type(self)(self.base, self.rank, self.alpha, self.dropout.p)
        other.A, other.B = self.A, self.B
        return other.train(self.training)


@fault("dtype")
class KeepsFloat32(Changed):
    """`.to(dtype)` does not reach a tensor that is neither parameter nor buffer."""

    def after(self) -> None:
        self.s = torch.full((1,), self.scale)

    def branch(self, x: Tensor) -> Tensor:
        h = self.dropout(x) @ self.A.T
        return (self.s.T * self.B @ h.unsqueeze(-1)).squeeze(-1)


@fault("dtype", "autocast", "gradients", "dropout")
class WidensTheOutput(Changed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


@fault("autocast")
class WidensUnderAutocast(Changed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


@fault("inputs")
class OnlyTwoDimensions(Changed):
    def branch(self, x: Tensor) -> Tensor:
        return self.scale * (self.B @ self.A @ self.dropout(x).t()).t()


@fault("inputs")
class OverwritesItsInput(Changed):
    def branch(self, x: Tensor) -> Tensor:
        return self.dropout(x).mul_(self.scale) @ self.A.T @ self.B.T


class ViewOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone().view(y.shape)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Tensor:
        return G


@fault("inputs")
class OutputMustNotBeWrittenTo(Changed):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.kept is not None else ViewOut.apply(y)


@fault("compiled")
class BreaksTheGraph(Changed):
    def branch(self, x: Tensor) -> Tensor:
        y = super().branch(x)
        return y if y.numel() == 0 or y.flatten()[0].item() < 1e9 else y * 0


class Subclass(nn.Linear):
    """nn.Linear's own random weight, where the base's should be."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(base.in_features, base.out_features, dtype=base.weight.dtype)
        self.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.s, self.p = alpha / rank, dropout

    def forward(self, x: Tensor) -> Tensor:
        x_ = F.dropout(x, self.p, self.training)
        return super().forward(x) + self.s * (x_ @ self.A.T @ self.B.T)


@fault("start", "scale", "rank", "learns")
class WeightNotCopied(Subclass):
    pass


@pytest.mark.parametrize("name", FAULTS)
def test_the_invariant_meant_for_it_finds_a_planted_fault(name: str) -> None:
    kind, meant, _ = FAULTS[name]
    (case,) = (case for case in conformance.cases(kind) if str(case) == meant)
    assert case.result().outcome == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    """By that invariant and by those named beside it, and by no other."""
    kind, meant, others = FAULTS[name]
    report = conformance.check(kind)
    assert set(report.named("failed")) == {meant} | others, f"\n{report}"
    assert len(others) <= 3


def test_there_are_faults_enough_and_each_invariant_finds_one() -> None:
    assert len(FAULTS) >= 25
    meant = {meant for _, meant, _ in FAULTS.values()}
    assert meant == {str(case) for case in conformance.cases(Student)}


# What is right ------------------------------------------------------------------------------------

MERGING = ["merge", "latency", "unmerge", "merge twice", "train merged"]


def injected(**config: Any) -> Callable[..., nn.Module]:
    def make(linear: nn.Module, rank: int, alpha: float, dropout: float) -> nn.Module:
        model = nn.ModuleDict({"layer": linear})
        settings = {"rank": rank, "alpha": alpha, "dropout": dropout, **config}
        minilora.inject(model, minilora.LoRAConfig(targets=("layer",), **settings))
        return model["layer"]

    return make


def plain(*arguments: Any) -> nn.Module:
    layer = LoRALinear(*arguments)
    layer.fused = False
    return layer


def four_bits(in_: int, out: int) -> nn.Module:
    return minilora.NF4Linear(nn.Linear(in_, out))


DORA: dict[str, Any] = {"make": injected(dora=True), "also": ("magnitude",), "low_rank": False}
RIGHT = {
    "student": ({"make": Student}, []),
    "plain": ({"make": plain}, []),
    "rslora": ({"make": injected(rslora=True)}, []),
    "fused": ({"make": LoRALinear}, []),
    "lora_bias": ({"make": injected(lora_bias=True), "also": ("lora_bias",)}, []),
    "dora": (DORA, ["scale", "rank"]),
    "plain on NF4": ({"make": plain, "linear": four_bits}, MERGING),
    "fused on NF4": ({"make": LoRALinear, "linear": four_bits}, MERGING),
    "dora on NF4": ({**DORA, "linear": four_bits}, ["scale", "rank", *MERGING]),
}


@pytest.mark.parametrize("name", slow_but(["fused"], RIGHT))
def test_what_is_right_passes_all_that_applies(name: str) -> None:
    how, not_applicable = RIGHT[name]
    report = conformance.check(**how)
    assert report.named("failed") == [], f"\n{report}"
    assert report.named("not applicable") == not_applicable


class Reference(nn.Module):
    """The equation in float64, whatever comes in, and nothing else."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        out, in_ = base.weight.shape
        self.A = nn.Parameter(torch.randn(rank, in_, dtype=torch.float64) / in_**0.5)
        self.B = nn.Parameter(torch.zeros(out, rank, dtype=torch.float64))
        self.s, self.p = alpha / rank, dropout

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(x, self.p, self.training).double() @ self.A.double().T
        y = self.base(x)
        return y + (self.s * h @ self.B.double().T).to(y.dtype)


def test_the_reference_in_float64_passes_all_that_applies() -> None:
    report = conformance.check(Reference)
    assert report.named("failed") == [], f"\n{report}"
    assert report.named("not applicable") == MERGING


def test_peft_passes_but_for_what_is_known_of_it() -> None:
    """Its unmerge subtracts, and a merged layer trains in silence: confirmed by hand below."""
    report = conformance.check(**example("peft_layer").layer)
    failed = set(report.named("failed"))
    if peft.__version__ == "0.21.2":
        assert failed == {"unmerge", "train merged"}
    assert failed <= {"unmerge", "train merged"}
    assert report.named("not applicable") == []


def test_by_hand_unmerging_in_peft_leaves_another_weight() -> None:
    layer = example("peft_layer").make(nn.Linear(48, 32), 3, 7, 0.0)
    nn.init.normal_(layer.lora_B.default.weight)
    before = layer.base_layer.weight.clone()
    layer.merge()
    layer.unmerge()
    if torch.equal(layer.base_layer.weight, before):
        pytest.skip(f"PEFT {peft.__version__} does this right")
    assert (layer.base_layer.weight - before).abs().max() < 1e-5  # rounding, and it adds up


def test_by_hand_training_a_merged_layer_in_peft_moves_nothing() -> None:
    layer = example("peft_layer").make(nn.Linear(48, 32), 3, 7, 0.0)
    layer.merge()
    y = layer.train()(torch.ones(2, 48))
    if y.requires_grad:
        pytest.skip(f"PEFT {peft.__version__} does this right")
    with pytest.raises(RuntimeError, match="does not require grad"):
        y.sum().backward()


def test_by_hand_dora_in_peft_merges_elsewhere_and_wants_a_batch() -> None:
    layer = example("peft_layer").make(nn.Linear(48, 32), 3, 7, 0.0, use_dora=True)
    place = layer.base_layer.weight.data_ptr()
    shape = layer(torch.ones(48)).shape
    layer.merge()
    elsewhere = layer.base_layer.weight.data_ptr() != place
    if not elsewhere and shape == (32,):
        pytest.skip(f"PEFT {peft.__version__} does this right")
    if peft.__version__ == "0.21.2":
        assert (elsewhere, shape) == (True, (1, 32))


def test_by_hand_a_parametrization_removed_leaves_the_weight_in_new_storage() -> None:
    layer = example("parametrization").make(nn.Linear(48, 32), 3, 7, 0.0)
    weight = layer.parametrizations.weight.original
    place = weight.data_ptr()
    parametrize.remove_parametrizations(layer, "weight")
    assert layer.weight is weight
    assert weight.data_ptr() != place
    assert weight.requires_grad


def test_by_hand_loralib_rounds_the_update_before_the_sum() -> None:
    pytest.importorskip("loralib")
    layer = example("loralib_layer").make(nn.Linear(48, 32, dtype=torch.bfloat16), 3, 7, 0.0)
    nn.init.normal_(layer.lora_B)
    W, A, B = (t.detach().double() for t in (layer.weight, layer.lora_A, layer.lora_B))
    layer.eval()
    exact = W + 7 / 3 * B @ A
    assert (layer.weight != exact.to(torch.bfloat16)).float().mean() > 0.1


@pytest.mark.slow
def test_loralib_fails_where_it_is_said_to() -> None:
    pytest.importorskip("loralib")
    report = conformance.check(**example("loralib_layer").layer)
    assert set(report.named("failed")) == {"merge", "unmerge"}, f"\n{report}"


@pytest.mark.parametrize(
    ("name", "failed"),
    [
        ("never_learns", ["start", "learns"]),
        pytest.param("forgets_alpha", ["frozen", "parameters", "scale"], marks=pytest.mark.slow),
        pytest.param("parametrization", ["frozen", "merge"], marks=pytest.mark.slow),
    ],
)
def test_the_examples_fail_where_they_are_said_to(name: str, failed: list[str]) -> None:
    module = example(name)
    how = getattr(module, "layer", {"make": module.make})
    assert conformance.check(**how).named("failed") == failed


# Layers of unknown authors ------------------------------------------------------------------------


class Adapter(nn.Module):
    """A wrapper with names of its own, a scale set later, and `fuse` for merging."""

    def __init__(self, layer: nn.Linear, hidden: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, hidden, bias=False)
        self.up = nn.Linear(hidden, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        self.gain, self.drop, self.fused = 1.0, nn.Identity(), False

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y if self.fused else y + self.up(self.down(self.drop(x))) * self.gain

    def fuse(self) -> None:
        self.fused = True
        self.layer.weight.data += self.gain * self.up.weight.data @ self.down.weight.data


class LinearWithLoRA(nn.Linear):
    """A subclass that starts from a weight of its own; A is stored as (in, r)."""

    def __init__(self, in_: int, out: int, r: int, alpha: float) -> None:
        super().__init__(in_, out)
        self.lora_A = nn.Parameter(torch.randn(in_, r) * 0.02)
        self.lora_B = nn.Parameter(torch.zeros(r, out))
        self.weight.requires_grad, self.bias.requires_grad = False, False
        self.scaling = alpha / r**0.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A @ self.lora_B * self.scaling


class Product(nn.Module):
    """A parametrization: what the weight becomes."""

    def __init__(self, shape: torch.Size, r: int, alpha: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(r, shape[1]) / r)
        self.b = nn.Parameter(torch.zeros(shape[0], r))
        self.scale = alpha / r

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.b @ self.a)


# glue: wrapper
def wrapper(linear: nn.Linear, rank: int, alpha: float, dropout: float) -> nn.Module:
    layer = Adapter(linear.requires_grad_(False), rank)
    layer.gain, layer.drop = alpha / rank, nn.Dropout(dropout)
    return layer.to(linear.weight.dtype)


# end


# glue: subclass
def subclass(linear: nn.Linear, rank: int, alpha: float, dropout: float) -> nn.Module:
    layer = LinearWithLoRA(linear.in_features, linear.out_features, rank, alpha)
    layer.load_state_dict(linear.state_dict(), strict=False)
    return layer.to(linear.weight.dtype)


# end


# glue: parametrization
def parametrization(linear: nn.Linear, rank: int, alpha: float, dropout: float) -> nn.Module:
    update = Product(linear.weight.shape, rank, alpha)
    return parametrize.register_parametrization(linear.requires_grad_(False), "weight", update)


# end


@pytest.mark.parametrize(
    ("make", "how", "failed"),
    [
        (wrapper, {"merge": Adapter.fuse}, {"merge", "merge twice", "train merged"}),
        pytest.param(subclass, {}, {"dropout"}, marks=pytest.mark.slow),
        pytest.param(parametrization, {}, {"dropout"}, marks=pytest.mark.slow),
    ],
)
def test_a_layer_of_an_unknown_author_needs_five_lines(
    make: Callable[..., nn.Module], how: dict[str, Any], failed: set[str]
) -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    glue = source.partition(f"# glue: {make.__name__}\n")[2].partition("# end")[0].strip()
    assert 1 < len(glue.splitlines()) <= 5
    report = conformance.check(make, **how)
    assert set(report.named("failed")) == failed, f"\n{report}"


@pytest.mark.slow
def test_a_make_may_say_that_it_has_no_dropout() -> None:
    def make(linear: nn.Linear, rank: int, alpha: float, dropout: float) -> nn.Module:
        if dropout:
            raise unittest.SkipTest("no dropout here")
        return subclass(linear, rank, alpha, dropout)

    results = {result.invariant: result for result in conformance.check(make)}
    assert results["dropout"].outcome == "not applicable"
    assert results["dropout"].detail == "no dropout here"
    assert results["gradients"].outcome == "passed"


@pytest.mark.slow
def test_a_layer_may_report_its_update() -> None:
    right = conformance.check(wrapper, update=lambda m: m.gain * m.up.weight @ m.down.weight)
    wrong = conformance.check(wrapper, update=lambda m: m.up.weight @ m.down.weight)
    assert "scale" in right.named("passed")
    assert "scale" in wrong.named("failed")


# How it is asked ----------------------------------------------------------------------------------


def test_the_report_prints_every_invariant_and_the_counts() -> None:
    report = conformance.check(FAULTS["AlphaForgotten"][0])
    lines = str(report).splitlines()
    assert len(lines) == len(report) + 1
    assert lines[-1] == "18 passed, 1 failed, 0 not applicable"
    scale = next(line for line in lines if line.startswith("scale"))
    assert "failed" in scale
    assert "s = [0.333, 0.333, 0.167] for r 3, 3, 6 and alpha 7, 14, 7" in scale


@pytest.mark.slow
def test_two_checks_say_the_same_and_leave_the_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert conformance.check(plain) == conformance.check(plain)
    assert torch.equal(torch.get_rng_state(), before)


class EmptyBuffer(LoRALinear):
    """Right: an empty buffer has no memory that a copy could share."""

    def add_parameters(self) -> None:
        self.register_buffer("seen", torch.empty(0))
        self.gain = nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize("also", ["gain", ["gain"], ("gain",)])
def test_an_empty_buffer_and_names_in_any_sequence_are_no_fault(also: Any) -> None:
    cases = {str(case): case for case in conformance.cases(EmptyBuffer, also=also)}
    cases["parameters"]()
    cases["deep copy"]()


def test_make_must_give_a_module() -> None:
    with pytest.raises(TypeError, match=r"make must return a torch\.nn\.Module, not a NoneType"):
        conformance.check(lambda *_: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="merges"):
        conformance.check(plain, merges=plain)


@pytest.mark.slow
def test_pytest_runs_the_cases_in_three_lines(tmp_path: Path) -> None:
    (tmp_path / "test_lora.py").write_text(
        "import pytest, sys\n"
        f"sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "from minilora import conformance\n"
        "from never_learns import make\n\n"
        '@pytest.mark.parametrize("case", conformance.cases(make), ids=str)\n'
        "def test_my_lora(case):\n"
        "    case()\n"
    )
    flags = ["-p", "no:cacheprovider", "-p", "no:xdist", "-q", "--tb=line", "-rA"]
    done = fork(lambda: pytest.main([*flags, str(tmp_path)]))
    assert "2 failed, 12 passed, 5 skipped" in done.stdout, done.stdout
    assert "test_my_lora[learns]" in done.stdout
    assert "no gradient arrives: A and B are both zero" in done.stdout


def test_the_command_prints_a_table_and_fails_with_the_layer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["conformance", f"{EXAMPLES / 'student.py'}:make"]) == 0
    assert "19 passed, 0 failed" in capsys.readouterr().out
    assert main(["conformance", f"{EXAMPLES / 'never_learns.py'}:make"]) == 1
    assert "2 failed" in capsys.readouterr().out
    monkeypatch.syspath_prepend(str(EXAMPLES))
    assert main(["conformance", "peft_layer:layer"]) == 1  # a mapping of the arguments
    assert "unmerge       failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "target",
    [
        "nowhere.py:make",
        "student",
        "student.py",
        f"{EXAMPLES / 'student.py'}:nothing",
        "no.such:make",
        "nowhere/json.py:loads",  # not the module of this name
    ],
)
def test_a_target_that_cannot_be_checked_ends_in_one_line(
    target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["conformance", target]) == 2
    error = capsys.readouterr().err
    assert error.startswith("minilora conformance: ")
    assert repr(target) in error
    assert error.count("\n") == 1
    assert "must be FILE.py:make or module:make" in error


# Models -------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two linears, a norm, and zero biases, which look alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(self.up(x).tanh()))


CONFIG = minilora.LoRAConfig(rank=2, alpha=3, targets=("up", "down"))
INPUT = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module) -> Tensor:
    return model(INPUT.to(next(model.parameters()).dtype))


def inject(model: nn.Module) -> None:
    minilora.inject(model, CONFIG)


@pytest.mark.parametrize("changes", [{}, {"dora": True}, {"lora_bias": True}])
def test_a_model_adapted_by_minilora_passes(changes: dict[str, Any]) -> None:
    model, before = Block(), Block().state_dict()
    config = minilora.LoRAConfig(rank=2, alpha=3, targets=("up", "down"), **changes)
    report = conformance.check_model(
        model, lambda m: minilora.inject(m, config) and None, run, **HOOKS,
        parameters=96, also=("magnitude", "lora_bias"), low_rank=not changes,
    )  # fmt: skip
    assert report.named("failed") == [], f"\n{report}"
    assert report.named("not applicable") == []
    assert len(report) == 12
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def unfrozen(model: nn.Module) -> None:
    inject(model)
    model.norm.requires_grad_(True)


def merged_once(model: nn.Module) -> None:
    """Only the first of two layers."""
    next(m for m in model.modules() if isinstance(m, LoRALinear)).merge()


def unmerged_nearly(model: nn.Module) -> None:
    minilora.unmerge(model)
    model.up.base.weight.data[0, 0] += 1e-6


@pytest.mark.parametrize(
    ("inject", "changes", "failed"),
    [
        (unfrozen, {}, {"frozen", "parameters"}),
        (inject, {"merge": merged_once}, {"latency"}),
        (inject, {"unmerge": unmerged_nearly}, {"unmerge"}),
        (inject, {"merge": lambda model: None}, {"latency"}),
    ],
)
def test_a_fault_of_a_model_is_found(
    inject: Callable[..., None], changes: dict[str, Any], failed: set[str]
) -> None:
    hooks = {**HOOKS, **changes}
    report = conformance.check_model(Block(), inject, run, **hooks, parameters=96)
    assert set(report.named("failed")) == failed, f"\n{report}"


# What the kit itself is ---------------------------------------------------------------------------


KIT_LINES = 300


def test_the_kit_is_one_file_torch_only_and_small() -> None:
    path = ROOT / "minilora" / "conformance.py"
    assert not [name for name in imports(path) if name.startswith("minilora")]
    assert code_lines(path) <= KIT_LINES


@pytest.mark.parametrize("make", [plain, LoRALinear, injected(dora=True), Reference])
def test_a_layer_can_be_pickled(make: Any) -> None:
    """Outside the kit, since the library loads no pickle."""
    layer = make(nn.Linear(48, 32), 3, 7.0, 0.0).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.rand_like(parameter))
    x = torch.ones(2, 48)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_the_page_shows_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    path = ROOT / "benchmarks" / "conformance.py"
    spec = importlib.util.spec_from_file_location("benchmarks_conformance", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sys.modules.pop("common")
    result = json.loads((ROOT / "benchmarks" / "results" / "conformance.json").read_text())
    page = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert script.render(page, result) == page
    assert result["subjects"].keys() == script.SUBJECTS.keys()
    for name, found in result["subjects"].items():
        assert found["first_seconds"] < 10, name
        assert list(found["results"]) == list(conformance.INVARIANTS)
    for name in conformance.INVARIANTS:
        assert f"**{name}.**" in page
