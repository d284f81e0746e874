"""Is this LoRA right? Nineteen invariants, checked on any layer or model.

    from minilora import conformance
    print(conformance.check(make))  # make(linear, rank, alpha, dropout) -> your layer

Each invariant is passed, failed with the number that shows it, or not applicable with the reason.
In words they are in docs/conformance.md. On the command line, with exit code 1 if anything failed:

    python -m minilora conformance FILE.py:make

What a layer computes is read from its outputs: in evaluation mode they are affine in x, and on the
identity matrix they are the weight W + s B A (out, in) that the layer stands for. The base's
tensors, A and B are found by their values and shapes; names matter only for merging, and can be
given.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import SkipTest

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Claims = Iterator[tuple[float, float, str]]
"""What an invariant yields: a number, the bound that it must not exceed, and what is measured."""

IN, OUT, RANK, ALPHA = 48, 32, 3, 7.0  # none alike, and s = 7 / 3 is no power of two
X = torch.randn(5, IN, generator=torch.Generator().manual_seed(2))  # (5, in)
ENDS = ("", "_adapter", "_weights", "_lora")  # usual names are merge, merge_adapter, ...
CLOSE = 1e-4  # relative; a mistake in the math is of order 1, rounding in float32 of order 1e-6


# What is checked ----------------------------------------------------------------------------------


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(), *module.named_buffers()])


def _changed(now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> int:
    """In how many entries tensors are not what they were."""
    return sum(int((now[name] != tensor).sum()) for name, tensor in before.items())


def _apart(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||: 0 only if they are equal."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30)) if a.shape == b.shape else torch.inf


def _module(result: Any, changed: nn.Module) -> nn.Module:
    """What a function gives, or what it has changed in place."""
    return result if isinstance(result, nn.Module) else changed


@dataclass
class Kit:
    """A layer or a model, built anew for every invariant, always from the same random numbers."""

    make: Callable[..., nn.Module]  # (linear, rank, alpha, dropout) -> the adapted layer
    base: nn.Module  # the linear; make is given a copy
    run: Callable[[Any, Tensor], Tensor] = lambda module, x: module(x.clone())
    merge: Callable[[Any], Any] | None = None
    unmerge: Callable[[Any], Any] | None = None
    update: Callable[[Any], Tensor] | None = None
    trainable: Callable[[Any], Any] = lambda m: (p for p in m.parameters() if p.requires_grad)
    parameters: int | None = None
    also: Any = ()
    low_rank: bool = True

    def __post_init__(self) -> None:
        """Find the base's tensors in what make gives, by their values: name there -> name here."""
        self.also = (self.also,) if isinstance(self.also, str) else tuple(self.also)
        made = self.make(copy.deepcopy(self.base), RANK, ALPHA, 0.0)
        if not isinstance(made, nn.Module):
            raise TypeError(f"make must return a torch.nn.Module, not a {type(made).__name__}")
        self.held = dict[str, str]()
        for own, b in _tensors(self.base).items():
            same = [name for name, t in _tensors(made).items() if _apart(t, b) == 0]
            self.held |= dict.fromkeys([n for n in same if not n.endswith(self.also)][:1], own)

    def build(self, random: bool = True, dtype: Any = torch.float32, **given: Any) -> nn.Module:
        """In training mode; `random` moves what trains away from its start, where B is zero."""
        torch.default_generator.manual_seed(0)
        settings = {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, **given}
        module = self.make(copy.deepcopy(self.base).to(dtype), *settings.values())
        module.train()  # as a statement: loralib's gives nothing back
        for parameter in self.adapter(module).values() if random else ():
            parameter.data += 0.3 * torch.randn_like(parameter)
        return module

    @torch.no_grad()
    def evaluate(self, module: nn.Module, x: Tensor = X) -> Tensor:
        module.eval()
        return self.run(module, x)

    def loss(self, module: Any, x: Tensor = X, target: Tensor | float = 0.0) -> Tensor:
        torch.default_generator.manual_seed(3)  # the same elements are dropped each time
        return (self.run(module, x) - target).square().sum()

    def gradient(self, module: nn.Module, forward: Any = None) -> Tensor:
        """dL/dA and dL/dB as one vector; 0 * p gives zero where none arrives."""
        loss, adapter = self.loss(module if forward is None else forward), self.adapter(module)
        loss = loss + sum(0 * p.sum() for p in adapter.values())
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*adapter.values()])])

    def trained(self, module: nn.Module) -> dict[str, nn.Parameter]:
        ids = {id(parameter) for parameter in self.trainable(module)}
        return {name: p for name, p in module.named_parameters() if id(p) in ids}

    def adapter(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """What trains and is not the base's."""
        return {name: p for name, p in self.trained(module).items() if name not in self.held}

    def frozen(self, module: nn.Module) -> dict[str, Tensor]:
        """The base's tensors as they are in the module now, by the base's names."""
        if not self.held:
            raise SkipTest("none of the base's tensors is in the module")
        tensors = _tensors(module)
        return {own: tensors[name if name in tensors else own] for name, own in self.held.items()}

    def affine(self, layer: nn.Module, dtype: Any = torch.float32) -> tuple[Tensor, Tensor, float]:
        """W' (out, in) and b' (out,), read from the outputs, and how far y is off W' x + b'."""
        x, eye = X.to(dtype), torch.eye(IN, dtype=dtype)
        b = self.evaluate(layer, 0 * x)[0]
        W = (self.evaluate(layer, eye) - b).T
        return W, b, _apart(self.evaluate(layer, x), x.to(W) @ W.T + b)

    def delta(self, layer: nn.Module) -> Tensor:
        """The update (out, in) that the forward pass adds to W."""
        W, _, nonlinear = self.affine(layer)
        if nonlinear > CLOSE or not self.low_rank:
            raise SkipTest("not a low-rank update: low_rank=False was given, or `rank` failed")
        return W - self.affine(self.base)[0]

    def product(self, layer: nn.Module, r: int) -> Tensor:
        """B A (out, in) of the two tensors of the shapes (r, in) and (out, r), either way round."""
        found = self.adapter(layer).values()
        A, B = ([p for p in found if {*p.shape} == {r, size}] for size in (IN, OUT))
        if len(A) != 1 or len(B) != 1:
            raise SkipTest("no two tensors of the shapes (r, in) and (out, r)")
        return (B[0] if B[0].shape[1] == r else B[0].T) @ (A[0] if A[0].shape[0] == r else A[0].T)

    def call(self, what: str, module: nn.Module) -> nn.Module:
        """Merge or unmerge, as given or by a method of a usual name. Either may return a module."""
        if not any(own.endswith("weight") for own in self.held.values()):
            raise SkipTest("no tensor of the layer is the base's weight")
        usual = [getattr(type(module), what + end, None) for end in ENDS]
        if not (does := getattr(self, what) or next(filter(None, usual), None)):
            raise SkipTest(f"the layer has no {what} method, and none was passed as {what}=...")
        return _module(does(module), module)


# The invariants -----------------------------------------------------------------------------------


def start(kit: Kit) -> Claims:
    """B A = 0 at the start, but not A: y = W x + b, bit for bit, in training and evaluation."""
    module, wanted = kit.build(random=False), kit.evaluate(kit.base)
    yield not kit.gradient(module).any(), 0, "no gradient arrives: A and B are both zero"
    for y in (kit.run(module, X), kit.evaluate(module)):
        yield _apart(y, wanted), 0 if kit.low_rank else 1e-6, "relative error of the initial output"


def frozen(kit: Kit) -> Claims:
    """W and b stay: no gradient, no step, no weight decay."""
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        module = kit.build()
        base, before = kit.frozen(module), copy.deepcopy(kit.frozen(module))
        optimizer = kind(kit.trained(module).values(), lr=0.1, weight_decay=0.1)
        for _ in range(3):
            kit.loss(module).backward()  # gradients add up, which is no matter here
            optimizer.step()
        asks = [name for name, t in base.items() if t.requires_grad or t.grad is not None]
        yield len(asks), 0, f"base tensors with requires_grad or a gradient: {asks}"
        yield _changed(kit.frozen(module), before), 0, "base weights changed by the optimizer"


def parameters(kit: Kit) -> Claims:
    """Exactly r (in + out) numbers train, those of A and B; what `also` names is not counted."""
    for r in (2 * RANK, RANK):
        trained = kit.trained(kit.build(rank=r))
        sizes = {name: p.numel() for name, p in trained.items() if not name.endswith(kit.also)}
        wanted = kit.parameters or r * (IN + OUT)
        yield abs(sum(sizes.values()) - wanted), 0, f"more or less trainable than {wanted}: {sizes}"


def learns(kit: Kit) -> Claims:
    """The loss falls to the sum of the squared singular values that rank r leaves over.

    That is the least that rank r can reach (Eckart and Young 1936): both A and B have to move.
    """
    module = kit.build(random=False)  # and a fixed seed
    values = torch.tensor([4.0, 3.0, 2.5, 1.0, 0.5])  # of a planted update of rank 5, above r
    U, V = (torch.linalg.qr(torch.randn(size, 5))[0] for size in (OUT, IN))
    target = kit.evaluate(kit.base, torch.eye(IN)) + V * values @ U.T  # (in, out)
    adam = torch.optim.Adam(kit.adapter(module).values(), lr=0.03)
    for _ in range(600):
        adam.zero_grad()
        loss = kit.loss(module, torch.eye(IN), target)
        loss.backward()
        adam.step()
    yield loss.item(), 1.05 * values[RANK:].square().sum().item(), "loss, at best 1.25"


def gradients(kit: Kit, drop: float = 0.0) -> Claims:
    """dL/dA, dL/dB, dL/dx are (L(p + e) - L(p - e)) / 2 e for a small step e, in float64."""
    module, x = kit.build(dropout=drop).double(), X.double().requires_grad_()
    asked = [p for n, p in kit.adapter(module).items() if kit.low_rank or n.endswith(kit.also)]
    torch.autograd.gradcheck(lambda *_: kit.loss(module, x), [x, *asked], fast_mode=True)
    yield 0, 0, "gradients differ from finite differences"


def scale(kit: Kit) -> Claims:
    """The scale is s = alpha / r, or alpha / sqrt(r)."""
    found = []
    for r, alpha in ((RANK, ALPHA), (RANK, 2 * ALPHA), (2 * RANK, ALPHA)):
        layer = kit.build(rank=r, alpha=alpha)
        delta, BA = kit.delta(layer), kit.product(layer, r)
        s = ((delta * BA).sum() / BA.square().sum()).item()
        found.append((round(s, 3), abs(s * r / alpha - 1), abs(s * r**0.5 / alpha - 1)))
        yield _apart(s * BA, delta), CLOSE, "relative difference of the update and s B A, best s"
        if says := kit.update or getattr(type(layer), "delta", None):
            yield _apart(says(layer), delta), CLOSE, "relative error of the reported update"
    seen, plain, root = zip(*found, strict=True)
    shown = f"s = {[*seen]} for r 3, 3, 6 and alpha 7, 14, 7"
    error = min(max(plain), max(root))
    yield error, CLOSE, f"{shown}; relative error against alpha / r or alpha / sqrt(r)"


def rank(kit: Kit) -> Claims:
    """The update is linear in x, with at most r singular values."""
    layer = kit.build()
    yield kit.affine(layer)[2], CLOSE, "relative deviation from a function linear in x"
    values = torch.linalg.svdvals(kit.delta(layer))
    yield (values[RANK] / values[0]).item(), CLOSE, "singular value r + 1 divided by the first"


def dropout(kit: Kit) -> Claims:
    """In training E[y] is the y of evaluation, and W x is never dropped."""
    layer = kit.build(random=False, dropout=0.5)  # B A = 0: no branch
    yield _apart(kit.run(layer, X), kit.evaluate(layer)), 1e-6, "change of W x + b due to dropout"
    layer, wanted = kit.build(dropout=0.5), kit.evaluate(kit.build())
    outputs = torch.stack([kit.run(layer, X).detach() for _ in range(400)])  # (400, 5, out)
    yield _apart(kit.evaluate(layer), wanted), 1e-6, "relative change by dropout in evaluation mode"
    error = outputs.std(0) / 20  # of the mean: sqrt(400) = 20
    yield bool(error.max() < 1e-6), 0, "nothing is dropped in training mode"
    yield ((outputs.mean(0) - wanted) / error).abs().max().item(), 6, "standard errors of the mean"
    yield from gradients(kit, drop=0.5)


def merge(kit: Kit) -> Claims:
    """W' = round(W + s B A), once, in the same storage; b' = b."""
    y, adapted, merged = map(kit.evaluate, [kit.base, kit.build(), kit.call("merge", kit.build())])
    yield _apart(merged - y, adapted - y), 1e-3, "relative error of the merged output"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for kind in dtypes if "weight" in kit.held.values() else ():  # else it is a model
        layer = kit.build(dtype=kind)
        places = {name: tensor.data_ptr() for name, tensor in kit.frozen(layer).items()}
        W, b, _ = kit.affine(kit.build(dtype=kind).double(), torch.float64)
        for name, now in kit.frozen(kit.call("merge", layer)).items():
            yield now.data_ptr() != places[name], 0, f"merging moves {name} in memory"
            wanted = {"weight": W if W.shape == now.shape else W.T, "bias": b}[name]  # Conv1D: W.T
            allowed = torch.finfo(kind).eps / 2 * wanted.abs() + 2.0**-21 * W.abs().max()
            wrong = int(((now.double() - wanted).abs() > allowed).sum())
            yield wrong, 0, f"entries of {name} in {kind} are not the exact sum rounded once"


def latency(kit: Kit) -> Claims:
    """Merged, it runs the base's operations on the base's shapes, and no other."""
    runs: list[Counter[str]] = []

    class Operations(TorchDispatchMode):  # counts what is computed, views apart
        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            shapes = [tuple(a.shape) for a in args if isinstance(a, Tensor)]
            runs[-1][f"{func} {shapes}"] += not func.is_view
            return func(*args, **(kwargs or {}))

    for module in (kit.base, kit.call("merge", kit.build())):
        runs.append(Counter())
        with Operations():  # type: ignore[no-untyped-call]
            kit.evaluate(module)
    other = [*((runs[0] - runs[1]) + (runs[1] - runs[0])).elements()]
    yield len(other), 0, f"operations differ from the base's: {other}"


def unmerge(kit: Kit) -> Claims:
    """W again, bit for bit, after each of 100 cycles."""
    for kind in (torch.float32, torch.bfloat16):
        module = kit.build(dtype=kind)
        before = copy.deepcopy(kit.frozen(module))
        for cycle in range(1, 101):
            now = kit.frozen(kit.call("unmerge", kit.call("merge", module)))
            yield _changed(now, before), 0, f"entries in {kind} differ after cycle {cycle}"


def merge_twice(kit: Kit) -> Claims:
    """The second merge changes nothing."""
    module = kit.call("merge", kit.build())
    once = copy.deepcopy(kit.frozen(module))
    with contextlib.suppress(Exception):  # refusing is harmless too
        kit.call("merge", module)
    yield _changed(kit.frozen(module), once), 0, "entries are changed by the second merge"


def train_merged(kit: Kit) -> Claims:
    """Training while merged is refused, or A and B get their gradients."""
    module, wanted = kit.call("merge", kit.build()), kit.gradient(kit.build())
    if kit.adapter(module).keys() != kit.adapter(kit.build()).keys():
        raise SkipTest("once merged, there is no adapter")
    got = wanted
    with contextlib.suppress(Exception):  # refusing is right too
        module.train()
        got = kit.gradient(module)
    yield _apart(got, wanted), 1e-3, "relative error of the gradients (0 if training is refused)"


def state_dict(kit: Kit) -> Claims:
    """Loaded into a fresh layer, it gives the same output."""
    module, other = kit.build(), kit.build(random=False)
    other.load_state_dict(copy.deepcopy(module.state_dict()))
    yield _apart(kit.evaluate(other), kit.evaluate(module)), 0, "relative error, saved and loaded"


def deep_copy(kit: Kit) -> Claims:
    """It computes the same, and shares nothing."""
    other = copy.deepcopy(module := kit.build())
    yield _apart(kit.evaluate(other), kit.evaluate(module)), 0, "relative error of a copy's output"
    mine, its = ({t.data_ptr() for t in _tensors(m).values()} for m in (module, other))
    yield len(mine & its - {0}), 0, "tensors shared with the original"


def dtype(kit: Kit) -> Claims:
    """`.to(dtype)` moves all of it."""
    for kind, bound in ((torch.float64, 1e-5), (torch.bfloat16, 0.05)):
        y = kit.evaluate(kit.build().to(kind), X.to(kind))
        yield y.dtype != kind, 0, f"after .to({kind}) the output is {y.dtype}"
        yield _apart(y, kit.evaluate(kit.build())), bound, f"relative error of the output in {kind}"


def autocast(kit: Kit) -> Claims:
    """The base's dtype, and gradients in the parameters' own."""
    module = kit.build()
    with torch.autocast("cpu", torch.bfloat16):
        y, base, gradient = kit.run(module, X), kit.run(kit.base, X), kit.gradient(module)
    yield y.dtype != base.dtype, 0, f"the output is {y.dtype}, the base's is {base.dtype}"
    yield _apart(gradient, kit.gradient(kit.build())), 0.1, "relative error of bfloat16 gradients"


def inputs(kit: Kit) -> Claims:
    """Any x (..., in), any strides, none of it overwritten; y may be written to."""
    layer, rows = kit.build(), X.clone()
    for x in (rows[0], rows.expand(2, 3, 5, IN), rows.T.contiguous().T, rows[:0]):
        kept, what = x.clone(), f"x {tuple(x.shape)} with strides {x.stride()}"
        wanted = layer(x.reshape(-1, IN).clone()).reshape(*x.shape[:-1], OUT)
        yield _apart(layer(x), wanted), CLOSE, f"relative error of the output for {what}"
        yield not torch.equal(x, kept), 0, f"the input is overwritten: {what}"
    gradient = kit.gradient(layer, lambda x: layer(x).mul_(1))
    yield _apart(gradient, kit.gradient(kit.build())), CLOSE, "gradient error when y is overwritten"


def compiled(kit: Kit) -> Claims:
    """torch.compile takes it as one graph, forward and backward."""
    torch.compiler.reset()
    layer = kit.build()
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    yield _apart(kit.gradient(layer, fast), kit.gradient(kit.build())), CLOSE, "gradient error"


INVARIANTS = {invariant.__name__.replace("_", " "): invariant for invariant in (
    start, frozen, parameters, learns, gradients, scale, rank, dropout, merge, latency, unmerge,
    merge_twice, train_merged, state_dict, deep_copy, dtype, autocast, inputs, compiled,
)}  # fmt: skip
OF_A_LAYER = {"learns", "scale", "rank", "dropout", "dtype", "inputs", "compiled"}


# How it is asked ----------------------------------------------------------------------------------


class Result(NamedTuple):
    """One line of a report.

    Attributes:
        invariant: its name.
        outcome: "passed", "failed" or "not applicable".
        detail: the number that shows it, the last one if it passed, or the reason.
    """

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


class Case(NamedTuple):
    """One invariant of one layer, as a test to be called. `str` is its name."""

    invariant: str
    kit: Kit

    def __str__(self) -> str:
        return self.invariant

    def __call__(self) -> str:
        """What was measured last. It raises AssertionError, or SkipTest if it is not applicable."""
        row = ""
        with torch.random.fork_rng(devices=[]):  # the global random state stays as it is
            for value, bound, text in INVARIANTS[self.invariant](self.kit):
                row = f"{value} {text}" if isinstance(value, int) else f"{text}: {value:.4g}"
                if not value <= bound:  # True is a fault without a number
                    raise AssertionError(text if value is True else f"{row} (allowed: {bound:.3g})")
        return row

    def result(self) -> Result:
        """What came of it."""
        try:
            return Result(self.invariant, "passed", self())
        except SkipTest as reason:
            return Result(self.invariant, "not applicable", str(reason))
        except Exception as error:
            raised = "" if type(error) is AssertionError else f"raised {type(error).__name__}: "
            return Result(self.invariant, "failed", " ".join(f"{raised}{error}".split())[:200])


def cases(make: Callable[..., nn.Module], linear: Any = nn.Linear, **how: Any) -> list[Case]:
    """The invariants of a layer one by one, for pytest.

        @pytest.mark.parametrize("case", conformance.cases(make), ids=str)
        def test_my_lora(case):
            case()

    Args:
        make: as in `check`, and so are the other arguments.
        linear: (in, out) -> the layer that make is given.
        how: merge, unmerge, trainable, update, also, low_rank.

    Returns:
        One test for each invariant: called, it passes, raises AssertionError or skips.

    Raises:
        TypeError: make returns no module.

    Example:
        >>> from minilora import LoRALinear
        >>> [str(case) for case in cases(LoRALinear)][:4]
        ['start', 'frozen', 'parameters', 'learns']
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)  # not the seed that make meets
        kit = Kit(make, linear(IN, OUT), **how)
    return [Case(name, kit) for name in INVARIANTS]


def check(make: Callable[..., nn.Module], **how: Any) -> Report:
    """Check a layer by every invariant.

    Args:
        make: (linear, rank, alpha, dropout) -> the layer, a module that holds linear or a copy of
            it. It may raise unittest.SkipTest, if it cannot do that, such as dropout.
        how: what `check` cannot find itself, by name:
            linear: (in, out) -> the layer that make is given; default `torch.nn.Linear`.
            merge, unmerge: functions of the layer (default: its method of that name). Either may
                return another module.
            trainable: layer -> the parameters that train (default: those that require a gradient).
            update: layer -> s B A (out, in) as the layer reports it (default: its method `delta`).
            also: a name or names, or their ends, of parameters that train in addition to A and B.
            low_rank: False says that the weight is not W + s B A, as in DoRA.

    Returns:
        The report: it prints, and `report.named("failed")` is empty if nothing failed.

    Raises:
        TypeError: make returns no module, or an argument has another name.

    Example:
        >>> from minilora import LoRALinear
        >>> class Forgets(LoRALinear):
        ...     def delta(self):  # alpha / r is forgotten where it is merged
        ...         return self.lora_B @ self.lora_A
        >>> report = check(Forgets)
        >>> [name for name in ("start", "scale", "merge") if name in report.named("failed")]
        ['scale', 'merge']
    """
    return Report(case.result() for case in cases(make, **how))


def check_model(
    model: nn.Module, inject: Callable[[Any], Any], run: Callable[[Any], Tensor], **how: Any
) -> Report:
    """Check a whole adapted model, by the invariants that do not need the layer itself.

    Args:
        model: the base; it is copied, never changed.
        inject: adapts a model in place, or returns the adapted one. It freezes the rest.
        run: model -> its output, always on the same inputs, in the model's dtype: gradients are
            checked in float64. Dropout of the model's own is off.
        how: as in `check`, and `parameters`, the number that should train. `merge` and `unmerge`
            take the adapted model.

    Returns:
        The report.

    Example:
        >>> import minilora
        >>> x, model = torch.ones(2, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
        >>> config = minilora.LoRAConfig(rank=2, targets=("0", "2"))
        >>> adapt = lambda model: minilora.inject(model, config)
        >>> hooks = {"merge": minilora.merge, "unmerge": minilora.unmerge, "parameters": 56}
        >>> run = lambda model: model(x.to(next(model.parameters()).dtype))
        >>> check_model(model, adapt, run, **hooks).named("failed")
        []
    """

    def make(base: nn.Module, *_: float) -> nn.Module:
        return _module(inject(base), base)

    with torch.random.fork_rng(devices=[]):
        kit = Kit(make, copy.deepcopy(model), lambda m, _: run(m), **how)
    return Report(Case(name, kit).result() for name in INVARIANTS if name not in OF_A_LAYER)
