"""Is this LoRA right? The invariants of low-rank adaptation, checked on anybody's layer.

    from minilora import conformance
    print(conformance.check(make))  # make(linear, rank, alpha, dropout) -> your layer

Each invariant is passed, failed with the number that shows it, or not applicable with the reason.
What a layer computes is read from its outputs: in evaluation mode they are affine in x, and on the
identity matrix they are the weight W + s B A (out, in) that the layer stands for. Names of
attributes matter only for merging, and can be given. docs/conformance.md explains each invariant.

On the command line, with exit code 1 if anything failed:

    python -m minilora conformance FILE.py:make
"""

import contextlib
import copy
import importlib.util
import math
import operator
import sys
import unittest
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

IN, OUT, RANK, ALPHA = 48, 32, 3, 7.0  # none alike, and s = 7 / 3 is no power of two
X = torch.randn(5, IN, generator=torch.Generator().manual_seed(2))  # (5, in)
CLOSE = 1e-4  # relative; a mistake in the math is of order 1, rounding in float32 of order 1e-6
USUAL = ("{}", "{}_adapter", "{}_weights", "{}_lora")  # names of the methods merge and unmerge

Make = Callable[[Any, int, float, float], nn.Module]
"""(linear, rank, alpha, dropout) -> the adapted layer."""
Claims = Iterator[tuple[float, float, str]]
"""What an invariant yields: a number, the bound that it must not exceed, what it measures."""


class NotApplicable(Exception):
    """An invariant says nothing about this layer; the message says why."""


class Result(NamedTuple):
    """One line of a report: "passed", "failed" or "not applicable", and what shows it."""

    invariant: str
    outcome: str
    detail: str


class Report(tuple[Result, ...]):
    """What `check` found: a result for each invariant. Printed, a table and the counts."""

    def named(self, outcome: str) -> list[str]:
        """The invariants with that outcome."""
        return [result.invariant for result in self if result.outcome == outcome]

    def __str__(self) -> str:
        lines = [f"{name:<13} {outcome:<14} {detail}" for name, outcome, detail in self]
        counts = (f"{len(self.named(o))} {o}" for o in ("passed", "failed", "not applicable"))
        return "\n".join([*lines, ", ".join(counts)])


# What is checked ----------------------------------------------------------------------------------


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(), *module.named_buffers()])


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _changed(now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> int:
    return sum(int((now[name] != tensor).sum()) for name, tensor in before.items())


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of b; 0 if they are equal."""
    if a.shape != b.shape or torch.equal(a.double(), b.double()):
        return 0.0 if a.shape == b.shape else math.inf
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@torch.no_grad()
def _dense(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The weight (out, in) and the bias (out,) of a layer in float64, from its outputs."""
    eye = torch.eye(IN, dtype=torch.float64)
    bias = layer.eval()(torch.zeros_like(eye[:1]))[0]  # (out,)
    return (layer(eye) - bias).T, bias


@dataclass
class _Kit:
    """A layer or a model, built anew for every invariant, always from the same random numbers."""

    make: Make
    base: Callable[[], nn.Module]
    run: Callable[[Any, Tensor], Tensor]
    parameters: int | None = None  # of a model
    merge: Callable[[Any], Any] | None = None
    unmerge: Callable[[Any], Any] | None = None
    update: Callable[[Any], Tensor] | None = None
    trainable: Callable[[Any], Any] = lambda module: filter(_asks, module.parameters())
    also: tuple[str, ...] = ()
    low_rank: bool = True
    is_model: bool = False

    def build(
        self, random: bool = True, dtype: torch.dtype = torch.float32, **settings: float
    ) -> nn.Module:
        """In training mode; `random` moves what trains away from its start, where B is zero."""
        torch.manual_seed(0)
        given: Any = {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, **settings}
        module = self.make(self.base().to(dtype), *given.values()).train()
        torch.manual_seed(1)
        for parameter in self.adapter(module).values() if random else ():
            parameter.data += (0.05 if self.is_model else 0.3) * torch.randn_like(parameter)
        return module

    def wide(self, **settings: Any) -> nn.Module:
        """The same values in float64."""
        module = self.build(**settings).double()
        try:
            self(module, X.double())
        except Exception as error:
            raise NotApplicable(f"in float64 forward raises {type(error).__name__}") from error
        return module

    def __call__(self, module: Any, x: Tensor = X) -> Tensor:
        return self.run(module, x)

    @torch.no_grad()
    def evaluate(self, module: nn.Module, x: Tensor = X) -> Tensor:
        return self(module.eval(), x)

    def loss(self, module: nn.Module, x: Tensor = X) -> Tensor:
        torch.manual_seed(3)  # the same elements are dropped each time
        return self(module, x).square().sum()

    @cached_property
    def held(self) -> dict[str, str]:
        """The module's names of the base's tensors -> the base's own names of them."""
        base, found = self.base(), {}
        own, tensors = _tensors(base), _tensors(self.make(base, RANK, ALPHA, 0.0))
        for mine, b in own.items():
            same = [n for n, t in tensors.items() if t.dtype == b.dtype and torch.equal(t, b)]
            found |= {max(same, key=lambda n, b=b: tensors[n] is b): mine} if same else {}
        return found

    def frozen(self, module: nn.Module) -> dict[str, Tensor]:
        """The base's tensors as they are in the module now, by the base's names."""
        if not self.held:
            raise NotApplicable("none of the base's tensors is in the module")
        tensors = _tensors(module)
        return {own: tensors[name if name in tensors else own] for name, own in self.held.items()}

    def trained(self, module: nn.Module) -> dict[str, Any]:
        ids = {id(parameter) for parameter in self.trainable(module)}
        return {name: p for name, p in module.named_parameters() if id(p) in ids}

    def adapter(self, module: nn.Module) -> dict[str, Any]:
        return {name: p for name, p in self.trained(module).items() if name not in self.held}

    def declared(self, name: str) -> bool:
        return f".{name}".endswith(tuple(f".{end}" for end in self.also))

    def delta(self, layer: nn.Module) -> Tensor:
        """The update (out, in) that the forward pass adds to W, in float64."""
        if not self.low_rank:
            raise NotApplicable("the weight was declared not to be W + s B A")
        return _dense(layer)[0] - _dense(self.base().double())[0]

    def factors(self, module: nn.Module, rank: int = RANK) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), found by their shapes, either way round."""
        rest = [t.detach() for name, t in _tensors(module).items() if name not in self.held]
        A = [t if t.shape[0] == rank else t.T for t in rest if {*t.shape} == {rank, IN}]
        B = [t if t.shape[1] == rank else t.T for t in rest if {*t.shape} == {rank, OUT}]
        if len(A) != 1 or len(B) != 1:
            raise NotApplicable("no two tensors of the shapes (r, in) and (out, r)")
        return A[0], B[0]

    def call(self, what: str, module: nn.Module) -> nn.Module:
        """Merge or unmerge, as given or by a method of a usual name. Either may return a module."""
        if not (self.is_model or "weight" in self.held.values()):
            raise NotApplicable("no tensor of the layer is the base's weight")
        names = [name.format(what) for name in USUAL]
        methods = [operator.methodcaller(name) for name in names if hasattr(module, name)]
        if not (does := getattr(self, what) or next(iter(methods), None)):
            raise NotApplicable(f"no {what} was given, and none of {', '.join(names)} is a method")
        result = does(module)
        return result if isinstance(result, nn.Module) else module


def _asks(parameter: Tensor) -> bool:
    return parameter.requires_grad


# The invariants: each yields numbers with their bounds ----------------------------------------------


def start(kit: _Kit) -> Claims:
    """y = W x + b, bit for bit, since B A = 0."""
    for mode in (True, False):
        y = kit(kit.build(random=False).train(mode))
        yield _apart(y, kit.evaluate(kit.base())), 1e-6 * (not kit.low_rank), "from the base's output"


def frozen(kit: _Kit) -> Claims:
    """dW = 0: no gradient, no step, no weight decay."""
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        module = kit.build()
        base = kit.frozen(module)
        before = _copies(base)
        optimizer = kind(kit.trained(module).values(), lr=0.1, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            kit.loss(module).backward()
            optimizer.step()
        asks = [name for name, t in base.items() if t.requires_grad or t.grad is not None]
        yield len(asks), 0, f"tensors of the base with a gradient {asks or ''}"
        yield _changed(kit.frozen(module), before), 0, "entries of the base that optimizers moved"


def parameters(kit: _Kit) -> Claims:
    """r (in + out) numbers train, and what was declared besides."""
    for rank in (2 * RANK, RANK):
        trained = kit.trained(kit.build(rank=rank))
        sizes = {name: p.numel() for name, p in trained.items() if not kit.declared(name)}
        wanted = rank * (IN + OUT) if kit.parameters is None else kit.parameters
        yield abs(sum(sizes.values()) - wanted), 0, f"numbers more or less than {wanted} {sizes}"


def learns(kit: _Kit) -> Claims:
    """The loss falls to the sum of the squared singular values that rank r leaves over."""
    module, x = kit.build(random=False), torch.eye(IN)
    before, adapter = _copies(kit.adapter(module)), kit.adapter(module)
    values = torch.tensor([4.0, 3.0, 2.5, 1.0, 0.5])  # of a planted update of rank 5, above r
    U, V = (torch.linalg.qr(torch.randn(size, 5))[0] for size in (OUT, IN))
    target = 0 if kit.is_model else kit.evaluate(kit.base(), x) + V * values @ U.T
    adam = torch.optim.Adam(adapter.values())
    for step in range(400):
        loss = (kit(module, x) - target).square().sum()
        if step == 2:
            still = [name for name, p in adapter.items() if torch.equal(p, before[name])]
            yield len(still), 0, f"parameters that two steps did not move {still or ''}"
            if kit.is_model:
                return
        adam.param_groups[0]["lr"] = 0.1 * (1 - step / 400)
        adam.zero_grad()
        loss.backward()
        adam.step()
    yield loss.item(), 1.05 * values[RANK:].square().sum().item(), "the loss, after 32.5"


def gradients(kit: _Kit) -> Claims:
    """<dL/dp, e> = (L(p + e) - L(p - e)) / 2 for a small step e, in float64."""
    for dropout in (0.0,) if kit.is_model else (0.0, 0.5):
        module, x = kit.wide(dropout=dropout).train(), X.double().requires_grad_()
        asked = {n: p for n, p in kit.adapter(module).items() if kit.low_rank or kit.declared(n)}
        kit.loss(module, x).backward()
        for name, tensor in {**asked, "x": x}.items():
            step, losses = 1e-5 * torch.randn_like(tensor), []
            for sign in (1, -2, 1):
                tensor.data += sign * step
                losses.append(kit.loss(module, x).item())
            wanted = (losses[0] - losses[1]) / 2
            got = 0.0 if tensor.grad is None else (tensor.grad * step).sum().item()
            off = abs(got - wanted) / max(abs(wanted), 1e-30)
            yield off, CLOSE, f"dL/d{name}, dropout {dropout}, from finite differences"


def scale(kit: _Kit) -> Claims:
    """s = alpha / r, or alpha / sqrt(r)."""
    found = []
    for r, alpha in ((RANK, ALPHA), (RANK, 2 * ALPHA), (2 * RANK, ALPHA)):
        layer = kit.wide(rank=r, alpha=alpha)
        delta, (A, B) = kit.delta(layer), kit.factors(layer, r)
        BA = B @ A  # (out, r) (r, in) -> (out, in)
        s = ((delta * BA).sum() / BA.square().sum()).item()
        yield _apart(s * BA, delta), CLOSE, "the update from s B A, for the best s"
        if says := kit.update or getattr(type(layer), "delta", None):
            yield _apart(says(layer), delta), CLOSE, "the update as reported from what forward adds"
        found.append((s, alpha / r, alpha / r**0.5))
    plain, root = (max(abs(row[0] / row[i] - 1) for row in found) for i in (1, 2))
    seen = ", ".join(f"{s:.3g}" for s, *_ in found)
    law = "alpha / r" if plain <= root else "alpha / sqrt(r)"
    yield min(plain, root), CLOSE, f"s at r, alpha = 3, 7; 3, 14; 6, 7 is {seen}; from {law}"


def rank(kit: _Kit) -> Claims:
    """The update is linear in x, with at most r singular values."""
    layer, x = kit.wide(), X.double()
    values, (W, b) = torch.linalg.svdvals(kit.delta(layer)), _dense(layer)
    yield _apart(kit.evaluate(layer, x), x @ W.T + b), CLOSE, "from a layer that is linear in x"
    yield (values[RANK] / values[0]).item(), 1e-5, "singular value r + 1, of the first"


def dropout(kit: _Kit) -> Claims:
    """In training E[y] is the y of evaluation, and W x is never dropped."""
    y, layer = kit.evaluate(kit.base()), kit.build(random=False, dropout=0.5)
    for factor in kit.factors(layer):
        factor.zero_()  # an empty branch: what is left is the base
    yield _apart(kit(layer), y), 1e-6 * (not kit.low_rank), "the base with dropout from without"
    layer, evaluated = kit.build(dropout=0.5), kit.evaluate(kit.build())  # (5, out)
    outputs = torch.stack([kit(layer).detach() for _ in range(400)])  # (400, 5, out)
    yield _apart(kit.evaluate(layer), evaluated), 1e-6, "evaluation mode from dropout 0"
    shares = ((outputs - y) * (evaluated - y)).sum((1, 2)) / (evaluated - y).square().sum()
    mean, error = shares.mean().item(), shares.std().item() / 20  # 1 where nothing is dropped
    yield int(error < 1e-4), 0, "nothing is dropped in training mode"
    yield abs(mean - 1) / error, 5, f"training's mean, {mean:.2f} of evaluation's, in deviations"


def merge(kit: _Kit) -> Claims:
    """W' = round(W + s B A), once, in the same storage; b' = b."""
    if kit.is_model:
        module, y = kit.build(), kit.evaluate(kit.base())
        wanted = kit.evaluate(module) - y
        yield _apart(kit.evaluate(kit.call("merge", module)) - y, wanted), 1e-3, "merged from not"
        return
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer, exact = kit.build(dtype=dtype), _dense(kit.wide(dtype=dtype))
        before = kit.frozen(layer)
        copies, places = _copies(before), {name: t.data_ptr() for name, t in before.items()}
        for name, now in kit.frozen(kit.call("merge", layer)).items():
            wanted = exact[name == "bias"]
            wanted = wanted if wanted.shape == now.shape else wanted.T  # Conv1D's is (in, out)
            unit = torch.nextafter(now.abs(), now.new_tensor(math.inf)) - now.abs()
            sums = 8 * 2.0**-24 * (wanted.abs().max() + exact[0].abs().max())  # float32's rounding
            allowed = unit.double() / 2 + sums * (wanted != copies[name])
            wrong = int(((now.double() - wanted).abs() > allowed).sum())
            yield wrong, 0, f"entries of {name} in {dtype} that are not rounded once"
            yield int(now.data_ptr() != places[name]), 0, f"moved in memory: {name}"


class _Operations(TorchDispatchMode):
    """Lists what is computed, views apart."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.seen += [f"{func} {[tuple(a.shape) for a in args if isinstance(a, Tensor)]}"]
        return func(*args, **(kwargs or {}))


def latency(kit: _Kit) -> Claims:
    """Merged, it runs the base's operations on the base's shapes, and no other."""
    runs = []
    for module in (kit.base(), kit.call("merge", kit.build())):
        with _Operations() as operations:
            operations.seen = []
            kit.evaluate(module)
        runs.append(operations.seen)
    other = [each for each in runs[1] if each not in runs[0]]
    yield abs(len(runs[1]) - len(runs[0])) + len(other), 0, f"operations unlike the base's {other or ''}"


def unmerge(kit: _Kit) -> Claims:
    """W again, bit for bit, after 1 and 100 cycles."""
    for dtype in (torch.float32,) if kit.is_model else (torch.float32, torch.bfloat16):
        module = kit.build(dtype=dtype)
        before = _copies(kit.frozen(module))
        for cycle in range(1, 101):
            kit.call("unmerge", kit.call("merge", module))
            if cycle in (1, 100):
                text = f"entries that differ after {cycle} cycle(s) in {dtype}"
                yield _changed(kit.frozen(module), before), 0, text


def merge_twice(kit: _Kit) -> Claims:
    """The second merge changes nothing."""
    module = kit.call("merge", kit.build())
    once = _copies(kit.frozen(module))
    with contextlib.suppress(Exception):  # refusing is harmless too
        kit.call("merge", module)
    yield _changed(kit.frozen(module), once), 0, "entries that the second merge changes"


def train_merged(kit: _Kit) -> Claims:
    """Training while merged is refused, or A and B get their gradients."""
    module, other = kit.call("merge", kit.build()), kit.build()
    got, wanted = kit.adapter(module), kit.adapter(other)
    if got.keys() != wanted.keys():
        raise NotApplicable("once merged, there is no adapter")
    kit.loss(other).backward()
    try:
        loss = kit.loss(module.train())
    except Exception as error:
        yield 0, 0, f"refused with {type(error).__name__}"
        return
    if loss.requires_grad:
        loss.backward()
    for name, p in got.items():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        yield _apart(grad, wanted[name].grad), 1e-3, f"the gradient of {name} off, and not refused"


def state_dict(kit: _Kit) -> Claims:
    """Loaded into a fresh layer, it gives the same output."""
    module, other = kit.build(), kit.build(random=False)
    other.load_state_dict(_copies(module.state_dict()))
    yield _apart(kit.evaluate(other), kit.evaluate(module)), 0, "the output off, loaded again"


def deep_copy(kit: _Kit) -> Claims:
    """It computes the same, and shares nothing."""
    module, y = kit.build(), kit.evaluate(kit.build())
    other = copy.deepcopy(module)
    yield _apart(kit.evaluate(copy.deepcopy(other)), y), 0, "the copy's output from the original's"
    for parameter in other.parameters():
        parameter.data += 1
    yield _apart(kit.evaluate(module), y), 0, "the original off, when the copy changes"


def dtype(kit: _Kit) -> Claims:
    """`.to(dtype)` moves all of it."""
    for kind, bound in ((torch.float64, 1e-5), (torch.bfloat16, 0.05)):
        y = kit.evaluate(kit.build().to(kind), X.to(kind))
        yield int(y.dtype != kind), 0, f"the output is of {y.dtype} after .to({kind})"
        yield _apart(y, kit.evaluate(kit.build())), bound, f"{kind} from float32"


def autocast(kit: _Kit) -> Claims:
    """The base's dtype, and gradients in the parameters' own."""
    module = kit.build()
    with torch.autocast("cpu", torch.bfloat16):
        y, base = kit(module), kit(kit.base())
    yield int(y.dtype != base.dtype), 0, f"{y.dtype} comes out, {base.dtype} out of the base"
    y.float().square().sum().backward()
    bad = [n for n, p in kit.adapter(module).items() if p.grad is None or p.grad.isnan().any()]
    yield len(bad), 0, f"parameters without a gradient {bad or ''}"
    yield _apart(y, kit(kit.build())), 0.05, "bfloat16 from float32"


def inputs(kit: _Kit) -> Claims:
    """Any x (..., in), any strides, none of it overwritten; y may be written to."""
    layer, y, many = kit.build(), kit(kit.build()), (2, 3, 5)
    for x, wanted in (
        (X[0], y[0]),
        (X.expand(*many, IN).contiguous(), y.expand(*many, OUT)),
        (X.expand(*many, IN), y.expand(*many, OUT)),
        (X.T.contiguous().T, y),
        (X[:0], y[:0]),
    ):
        kept, what = x.clone(), f"x {tuple(x.shape)} with strides {x.stride()}"
        yield _apart(kit(layer, x), wanted), CLOSE, f"y off for {what}"
        yield int(not torch.equal(x, kept)), 0, f"overwritten: {what}"
    grads = []
    for double in (torch.mul, Tensor.mul_):
        layer = kit.build()
        double(kit(layer), 2).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in kit.adapter(layer).values()]))
    yield _apart(*grads), CLOSE, "gradients off, once y is written to"


def compiled(kit: _Kit) -> Claims:
    """torch.compile takes it as one graph."""
    torch.compiler.reset()
    found = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, fullgraph=True, backend="aot_eager")):
        module = kit.build()
        y = kit(wrap(module))
        y.square().sum().backward()
        found.append(torch.cat([t.flatten() for t in (y, *(p.grad for p in kit.adapter(module).values()))]))
    yield _apart(*found), CLOSE, "y and the gradients off, compiled as one graph"


INVARIANTS: dict[str, Callable[[_Kit], Claims]] = {
    f.__name__.replace("_", " "): f
    for f in (
        start, frozen, parameters, learns, gradients, scale, rank, dropout, merge, latency, unmerge,
        merge_twice, train_merged, state_dict, deep_copy, dtype, autocast, inputs, compiled,
    )
}  # fmt: skip
OF_A_LAYER = {"scale", "rank", "dropout", "dtype", "inputs", "compiled"}


# How to ask ---------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One invariant of one layer: a test. `str` is its name."""

    invariant: str
    kit: _Kit

    def __str__(self) -> str:
        return self.invariant

    def result(self) -> Result:
        """What came of it; the global random state stays as it is."""
        detail = ""
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")
                for value, bound, text in INVARIANTS[self.invariant](self.kit):
                    detail = f"{text}: {value:.3g}"
                    if not value <= bound:
                        return Result(self.invariant, "failed", f"{detail}, not {bound:.3g}")
        except (NotApplicable, NotImplementedError) as reason:
            if not detail:
                return Result(self.invariant, "not applicable", str(reason))
        except Exception as error:
            text = " ".join(f"raised {type(error).__name__}: {error}".split())
            return Result(self.invariant, "failed", text[:300])
        return Result(self.invariant, "passed", detail)

    def __call__(self) -> None:
        """Raise AssertionError if it failed; skip, as pytest knows it, if it is not applicable."""
        _, outcome, detail = self.result()
        if outcome != "passed":
            raise AssertionError(detail) if outcome == "failed" else unittest.SkipTest(detail)


def cases(make: Make, linear: Callable[[int, int], nn.Module] = nn.Linear, **how: Any) -> list[Case]:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return linear(IN, OUT)

    kit = _Kit(make, base, lambda module, x: module(x), **how)
    if not isinstance(make(base(), RANK, ALPHA, 0.0), nn.Module):
        raise TypeError("make(linear, rank, alpha, dropout) must return a module")
    return [Case(name, kit) for name in INVARIANTS]


def check(make: Make, **how: Any) -> Report:
    return Report(case.result() for case in cases(make, **how))


def check_model(
    model: nn.Module, inject: Callable[[Any], Any], run: Callable[[Any], Tensor], **how: Any
) -> Report:
    def make(base: nn.Module, *_: float) -> nn.Module:
        result = inject(base)
        return result if isinstance(result, nn.Module) else base

    kit = _Kit(make, lambda: copy.deepcopy(model), lambda m, _: run(m), is_model=True, **how)
    return Report(Case(name, kit).result() for name in INVARIANTS if name not in OF_A_LAYER)


def main(target: str) -> int:
    from minilora import LoRAError

    place, _, name = target.rpartition(":")
    try:
        if place.endswith(".py"):
            sys.path.insert(0, str(Path(place).parent))  # as `python FILE.py` does
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        found = getattr(module, name)
        report = check(**found) if isinstance(found, Mapping) else check(found)
    except Exception as error:
        raise LoRAError(f"{target}: {type(error).__name__}: {error}; name it FILE.py:make") from error
    print(report)
    return int(bool(report.named("failed")))
