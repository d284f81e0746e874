"""Is this LoRA right? Nineteen invariants, checked on anybody's layer or model.

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
import math
import unittest
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Make = Callable[[Any, int, float, float], nn.Module]
"""(linear, rank, alpha, dropout) -> the adapted layer."""
Claims = Iterator[tuple[float, float, str]]
"""What an invariant yields: a number, the bound that it must not exceed, and what is so many."""

IN, OUT, RANK, ALPHA = 48, 32, 3, 7.0  # none alike, and s = 7 / 3 is no power of two
X = torch.randn(5, IN, generator=torch.Generator().manual_seed(2))  # (5, in)
CLOSE = 1e-4  # relative; a mistake in the math is of order 1, rounding in float32 of order 1e-6
USUAL = ("{}", "{}_adapter", "{}_weights", "{}_lora")  # names of the methods merge and unmerge


class NotApplicable(Exception):
    """An invariant says nothing about this layer; the message says why."""


# What is checked ----------------------------------------------------------------------------------


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(), *module.named_buffers()])


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors if tensor is not None])


def _changed(now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> int:
    """In how many entries tensors are not what they were."""
    return sum(int((now[name] != tensor).sum()) for name, tensor in before.items())


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of b; 0 if they are equal."""
    if a.shape != b.shape or torch.equal(a.double(), b.double()):
        return 0.0 if a.shape == b.shape else math.inf
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@torch.no_grad()
def _dense(layer: nn.Module) -> tuple[dict[str, Tensor], float]:
    """The weight (out, in) and the bias (out,) of a layer in float64, and how nonlinear it is."""
    layer.eval()
    eye, x = torch.eye(IN, dtype=torch.float64), X.double()
    bias = layer(torch.zeros_like(eye[:1]))[0].double()  # (out,)
    weight = (layer(eye) - bias).T  # (out, in)
    return {"weight": weight, "bias": bias}, _apart(layer(x.clone()), x @ weight.T + bias)


@dataclass
class Kit:
    """A layer or a model, built anew for every invariant, always from the same random numbers."""

    make: Make
    base: Callable[[], nn.Module]
    run: Callable[[Any, Tensor], Tensor]
    is_model: bool = False
    merge: Callable[[Any], Any] | None = None
    unmerge: Callable[[Any], Any] | None = None
    update: Callable[[Any], Tensor] | None = None
    trainable: Callable[[Any], Any] = lambda m: (p for p in m.parameters() if p.requires_grad)
    parameters: int | None = None
    also: tuple[str, ...] = ()
    low_rank: bool = True

    def build(self, random: bool = True, dtype: Any = torch.float32, **given: Any) -> nn.Module:
        """In training mode; `random` moves what trains away from its start, where B is zero."""
        torch.manual_seed(0)
        settings = {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, **given}
        module = self.make(self.base().to(dtype), *settings.values())
        module.train()  # as a statement: loralib's gives nothing back
        torch.manual_seed(1)
        for parameter in self.adapter(module).values() if random else ():
            parameter.data += (0.05 if self.is_model else 0.3) * torch.randn_like(parameter)
        return module

    def wide(self, **given: Any) -> nn.Module:
        """The same values in float64."""
        module = self.build(**given)
        module.double()
        try:
            self(module, X.double())
        except Exception as error:
            raise NotApplicable(f"in float64 forward raises {type(error).__name__}") from error
        return module

    def __call__(self, module: Any, x: Tensor = X) -> Tensor:
        return self.run(module, x.clone())  # whatever the module does to it

    @torch.no_grad()
    def evaluate(self, module: nn.Module, x: Tensor = X) -> Tensor:
        module.eval()
        return self(module, x)

    def loss(self, module: nn.Module, x: Tensor = X) -> Tensor:
        torch.manual_seed(3)  # the same elements are dropped each time
        return self(module, x).square().sum()

    @cached_property
    def held(self) -> dict[str, str]:
        """The module's names of the base's tensors -> the base's own names of them."""
        base, found = self.base(), dict[str, str]()
        own, tensors = _tensors(base), _tensors(self.make(base, RANK, ALPHA, 0.0))
        for mine, b in own.items():
            same = [n for n, t in tensors.items() if t.dtype == b.dtype and torch.equal(t, b)]
            itself = [name for name in same if tensors[name] is b]
            found |= dict.fromkeys((itself + same)[:1], mine)
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

    def dense(self, **given: Any) -> dict[str, Tensor]:
        """The weight (out, in) and the bias (out,) that the forward pass computes with."""
        tensors, nonlinear = _dense(self.wide(**given))
        if nonlinear > CLOSE:
            raise NotApplicable("the layer is not linear in x: see rank")
        return tensors

    def delta(self, **given: Any) -> Tensor:
        """The update (out, in) that the forward pass adds to W, in float64."""
        if not self.low_rank:
            raise NotApplicable("the weight was declared not to be W + s B A")
        return self.dense(**given)["weight"] - _dense(self.base().double())[0]["weight"]

    def factors(self, module: nn.Module, r: int = RANK) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), found by their shapes, either way round."""
        rest = [t.detach() for name, t in _tensors(module).items() if name not in self.held]
        A = [t if t.shape[0] == r else t.T for t in rest if {*t.shape} == {r, IN}]
        B = [t if t.shape[1] == r else t.T for t in rest if {*t.shape} == {r, OUT}]
        if len(A) != 1 or len(B) != 1:
            raise NotApplicable("no two tensors of the shapes (r, in) and (out, r)")
        return A[0], B[0]

    def call(self, what: str, module: nn.Module) -> nn.Module:
        """Merge or unmerge, as given or by a method of a usual name. Either may return a module."""
        if not (self.is_model or "weight" in self.held.values()):
            raise NotApplicable("no tensor of the layer is the base's weight")
        usual = (getattr(type(module), name.format(what), None) for name in USUAL)
        if not (does := getattr(self, what) or next(filter(None, usual), None)):
            raise NotApplicable(f"no {what} was given or found")
        result = does(module)
        return result if isinstance(result, nn.Module) else module

    def merged(self) -> nn.Module:
        """Merged, with its adapter still there."""
        module = self.call("merge", self.build())
        if self.adapter(module).keys() != self.adapter(self.build()).keys():
            raise NotApplicable("once merged, there is no adapter")
        return module


# The invariants -----------------------------------------------------------------------------------


def start(kit: Kit) -> Claims:
    """B A = 0 at the start: y = W x + b, bit for bit, in training and in evaluation."""
    module, wanted = kit.build(random=False), kit.evaluate(kit.base())
    for y in (kit(module), kit.evaluate(module)):
        yield _apart(y, wanted), 0 if kit.low_rank else 1e-6, "off the base's output"


def frozen(kit: Kit) -> Claims:
    """W and b stay: no gradient, no step, no weight decay."""
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        module = kit.build()
        base, before = kit.frozen(module), _copies(kit.frozen(module))
        optimizer = kind(kit.trained(module).values(), lr=0.1, weight_decay=0.1)
        for _ in range(3):
            kit.loss(module).backward()  # gradients add up, which is no matter here
            optimizer.step()
        asks = [name for name, t in base.items() if t.requires_grad or t.grad is not None]
        yield len(asks), 0, f"tensors of the base ask for a gradient {asks or ''}"
        yield _changed(kit.frozen(module), before), 0, "entries of the base are moved by optimizers"


def parameters(kit: Kit) -> Claims:
    """A and B train, r (in + out) numbers, and what was declared besides."""
    if kit.is_model and kit.parameters is None:
        raise NotApplicable("the number of trainable parameters was not given")
    for r in (2 * RANK, RANK):
        trained = kit.trained(kit.build(rank=r))
        sizes = {name: p.numel() for name, p in trained.items() if not kit.declared(name)}
        wanted = r * (IN + OUT) if kit.parameters is None else kit.parameters
        yield abs(sum(sizes.values()) - wanted), 0, f"off {wanted}, the numbers that train: {sizes}"


def learns(kit: Kit) -> Claims:
    """The loss falls to the sum of the squared singular values that rank r leaves over."""
    module, x = kit.build(random=False), torch.eye(IN)
    adapter, before = kit.adapter(module), _copies(kit.adapter(module))
    values = torch.tensor([4.0, 3.0, 2.5, 1.0, 0.5])  # of a planted update of rank 5, above r
    U, V = (torch.linalg.qr(torch.randn(size, 5))[0] for size in (OUT, IN))
    target = 0 if kit.is_model else kit.evaluate(kit.base(), x) + V * values @ U.T
    adam = torch.optim.Adam(adapter.values())
    for step in range(2 if kit.is_model else 400):
        adam.param_groups[0]["lr"] = 0.1 * (1 - step / 400)
        adam.zero_grad()
        loss = (kit(module, x) - target).square().sum()
        loss.backward()
        adam.step()
        if step == 1:
            still = [name for name, p in adapter.items() if torch.equal(p, before[name])]
            yield len(still), 0, f"parameters do not move in two steps {still or ''}"
    if not kit.is_model:
        first, bound = (v.square().sum().item() for v in (values, values[RANK:]))
        yield loss.item(), 1.05 * bound, f"is the loss, from {first:.3g}"  # Eckart and Young 1936


def gradients(kit: Kit) -> Claims:
    """<dL/dp, e> = (L(p + e) - L(p - e)) / 2 for a small step e, in float64."""
    for drop in (0.0,) if kit.is_model else (0.0, 0.5):
        module, x = kit.wide(dropout=drop), X.double().requires_grad_()
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
            yield off, CLOSE, f"off finite differences: dL/d{name} with dropout {drop}"


def scale(kit: Kit) -> Claims:
    """The scale is s = alpha / r, or alpha / sqrt(r)."""
    found = []
    for r, alpha in ((RANK, ALPHA), (RANK, 2 * ALPHA), (2 * RANK, ALPHA)):
        delta, layer = kit.delta(rank=r, alpha=alpha), kit.wide(rank=r, alpha=alpha)
        A, B = kit.factors(layer, r)
        BA = B @ A  # (out, r) (r, in) -> (out, in)
        s = ((delta * BA).sum() / BA.square().sum()).item()
        found.append((s, alpha / r, alpha / r**0.5))
        yield _apart(s * BA, delta), CLOSE, "off s B A for the best s: the update"
        if says := kit.update or getattr(type(layer), "delta", None):
            yield _apart(says(layer), delta), CLOSE, "off what forward adds: the update it reports"
    plain, root = (max(abs(row[0] / row[i] - 1) for row in found) for i in (1, 2))
    seen, law = [round(s, 3) for s, *_ in found], "r" if plain <= root else "sqrt(r)"
    yield min(plain, root), CLOSE, f"off alpha / {law}: s = {seen} at r 3, 3, 6 and alpha 7, 14, 7"


def rank(kit: Kit) -> Claims:
    """The update is linear in x, with at most r singular values."""
    nonlinear = _dense(kit.wide())[1]
    if kit.low_rank or nonlinear > CLOSE:
        yield nonlinear, CLOSE, "off a layer that is linear in x"
    values = torch.linalg.svdvals(kit.delta())
    yield (values[RANK] / values[0]).item(), 1e-5, "of the first is singular value r + 1"


def dropout(kit: Kit) -> Claims:
    """In training E[y] is the y of evaluation, and W x is never dropped."""
    layer = kit.build(random=False, dropout=0.5)
    for factor in kit.factors(layer):
        factor.zero_()  # an empty branch: what is left is the base
    training, y = kit(layer), kit.evaluate(layer)
    yield _apart(training, y), 0 if kit.low_rank else 1e-6, "off W x + b: the base's part, dropped"
    layer, evaluated = kit.build(dropout=0.5), kit.evaluate(kit.build())  # (5, out)
    outputs = torch.stack([kit(layer).detach() for _ in range(400)])  # (400, 5, out)
    yield _apart(kit.evaluate(layer), evaluated), 1e-6, "off dropout 0 in evaluation mode"
    shares = ((outputs - y) * (evaluated - y)).sum((1, 2)) / (evaluated - y).square().sum()
    mean, error = shares.mean().item(), shares.std().item() / 20  # 20 = sqrt(400)
    yield int(error < 1e-4), 0, "if something is dropped in training mode"
    text = f"standard errors off: training's mean is {mean:.2f} of evaluation's"
    yield abs(mean - 1) / error, 5, text


def merge(kit: Kit) -> Claims:
    """W' = round(W + s B A), once, in the same storage; b' = b."""
    if kit.is_model:
        modules = kit.base(), kit.build(), kit.call("merge", kit.build())
        y, adapted, merged = map(kit.evaluate, modules)
        yield _apart(merged - y, adapted - y), 1e-3, "off the unmerged change of the output"
    for kind in () if kit.is_model else (torch.float32, torch.bfloat16, torch.float16):
        layer, exact = kit.build(dtype=kind), kit.dense(dtype=kind)
        before = {n: (t.detach().clone(), t.data_ptr()) for n, t in kit.frozen(layer).items()}
        after = kit.frozen(kit.call("merge", layer))
        for name, now in after.items():
            wanted = exact[name] if exact[name].shape == now.shape else exact[name].T  # Conv1D
            unit = torch.nextafter(now.abs(), now.new_tensor(math.inf)) - now.abs()
            sums = 2.0**-21 * exact["weight"].abs().max()  # what a sum in float32 rounds away
            allowed = unit.double() / 2 + sums * (wanted != before[name][0])
            wrong = int(((now.double() - wanted).abs() > allowed).sum())
            yield wrong, 0, f"entries of {name} in {kind} are not W + s B A rounded once"
        moved = [name for name, t in after.items() if t.data_ptr() != before[name][1]]
        yield len(moved), 0, f"tensors are moved in memory {moved or ''}"


class _Operations(TorchDispatchMode):
    """Counts what is computed, views apart."""

    seen: Counter[str]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f"{func} {[tuple(a.shape) for a in args if isinstance(a, Tensor)]}"
        self.seen[name] += not func.is_view
        return func(*args, **(kwargs or {}))


def latency(kit: Kit) -> Claims:
    """Merged, it runs the base's operations on the base's shapes, and no other."""
    runs = []
    for module in (kit.base(), kit.call("merge", kit.build())):
        with _Operations() as operations:  # type: ignore[no-untyped-call]
            operations.seen = Counter()
            kit.evaluate(module)
        runs.append(operations.seen)
    other = list(((runs[0] - runs[1]) + (runs[1] - runs[0])).elements())
    yield len(other), 0, f"operations are not the base's {other or ''}"


def unmerge(kit: Kit) -> Claims:
    """W again, bit for bit, after 1 and 100 cycles."""
    for kind in (torch.float32,) if kit.is_model else (torch.float32, torch.bfloat16):
        module = kit.build(dtype=kind)
        before = _copies(kit.frozen(module))
        for cycle in range(1, 101):
            kit.call("unmerge", kit.call("merge", module))
            if cycle in (1, 100):
                text = f"entries of the base in {kind} differ after {cycle} cycle(s)"
                yield _changed(kit.frozen(module), before), 0, text


def merge_twice(kit: Kit) -> Claims:
    """The second merge changes nothing."""
    module = kit.merged()
    once = _copies(kit.frozen(module))
    with contextlib.suppress(Exception):  # refusing is harmless too
        kit.call("merge", module)
    yield _changed(kit.frozen(module), once), 0, "entries are changed by the second merge"


def train_merged(kit: Kit) -> Claims:
    """Training while merged is refused, or A and B get their gradients."""
    module, unmerged = kit.merged(), kit.build()
    try:
        module.train()
        loss = kit.loss(module)
    except Exception as error:
        yield 0, 0, f"gradients are lost: it refuses with {type(error).__name__}"
        return
    for each in (loss, kit.loss(unmerged)):
        if each.requires_grad:
            each.backward()
    for name, p in kit.adapter(unmerged).items():
        got = kit.adapter(module)[name].grad
        off = 1.0 if got is None else _apart(got, p.grad)
        yield off, 1e-3, f"off the right gradient of {name}, and nothing is refused"


def state_dict(kit: Kit) -> Claims:
    """Loaded into a fresh layer, it gives the same output."""
    module, other = kit.build(), kit.build(random=False)
    other.load_state_dict(_copies(module.state_dict()))
    yield _apart(kit.evaluate(other), kit.evaluate(module)), 0, "off the output, saved and loaded"


def deep_copy(kit: Kit) -> Claims:
    """It computes the same, and shares nothing."""
    module, y = kit.build(), kit.evaluate(kit.build())
    other = copy.deepcopy(module)
    yield _apart(kit.evaluate(copy.deepcopy(other)), y), 0, "off the original's output: the copy's"
    for parameter in other.parameters():
        parameter.data += 1
    yield _apart(kit.evaluate(module), y), 0, "off its own output, once the copy has changed"


def dtype(kit: Kit) -> Claims:
    """`.to(dtype)` moves all of it."""
    for kind, bound in ((torch.float64, 1e-5), (torch.bfloat16, 0.05)):
        y = kit.evaluate(kit.build().to(kind), X.to(kind))
        yield int(y.dtype != kind), 0, f"if .to({kind}) gives an output of {y.dtype}"
        yield _apart(y, kit.evaluate(kit.build())), bound, f"off float32's output in {kind}"


def autocast(kit: Kit) -> Claims:
    """The base's dtype, and gradients in the parameters' own."""
    module = kit.build()
    with torch.autocast("cpu", torch.bfloat16):
        y, base = kit(module), kit(kit.base())
    text = f"if the output is of {y.dtype}, the base's of {base.dtype}"
    yield int(y.dtype != base.dtype), 0, text
    y.float().square().sum().backward()
    bad = [n for n, p in kit.adapter(module).items() if p.grad is None or p.grad.isnan().any()]
    yield len(bad), 0, f"parameters get no finite gradient {bad or ''}"
    yield _apart(y, kit(kit.build())), 0.05, "off float32's output in bfloat16"


def inputs(kit: Kit) -> Claims:
    """Any x (..., in), any strides, none of it overwritten; y may be written to."""
    layer, dense, many = kit.build(), kit.dense(), X.expand(2, 3, 5, IN)
    for x in (X[0], many.contiguous(), many, X.T.contiguous().T, X[:0]):
        kept, what = x.clone(), f"x {tuple(x.shape)} with strides {x.stride()}"
        wanted = x.double() @ dense["weight"].T + dense["bias"]
        yield _apart(kit.run(layer, x), wanted), CLOSE, f"off the output for {what}"
        yield int(not torch.equal(x, kept)), 0, f"times overwritten: {what}"
    grads = []
    for double in (torch.mul, Tensor.mul_):
        layer = kit.build()
        double(kit(layer), 2).square().sum().backward()
        grads.append(_flat(p.grad for p in kit.adapter(layer).values()))
    yield _apart(*grads), CLOSE, "off the gradients, if the output is written to"


def compiled(kit: Kit) -> Claims:
    """torch.compile takes it as one graph, forward and backward."""
    torch.compiler.reset()
    found = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, fullgraph=True, backend="aot_eager")):
        module = kit.build()
        y = kit(wrap(module))
        y.square().sum().backward()
        found.append(_flat([y, *(p.grad for p in kit.adapter(module).values())]))
    yield _apart(*found), CLOSE, "off the output and the gradients, compiled"


_IN_ORDER = (
    start, frozen, parameters, learns, gradients, scale, rank, dropout, merge, latency, unmerge,
    merge_twice, train_merged, state_dict, deep_copy, dtype, autocast, inputs, compiled,
)  # fmt: skip
INVARIANTS = {invariant.__name__.replace("_", " "): invariant for invariant in _IN_ORDER}
OF_A_LAYER = {"scale", "rank", "dropout", "dtype", "inputs", "compiled"}


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

    def result(self) -> Result:
        """What came of it; the global random state stays as it is."""
        detail = ""
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")
                for value, bound, text in INVARIANTS[self.invariant](self.kit):
                    number = f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
                    detail = f"{number} {text}".rstrip()
                    if not value <= bound:
                        return Result(self.invariant, "failed", f"{detail} (allowed: {bound:.3g})")
        except (NotApplicable, NotImplementedError) as reason:
            if not detail:  # nothing was measured before
                return Result(self.invariant, "not applicable", str(reason))
        except Exception as error:
            text = " ".join(f"raised {type(error).__name__}: {error}".split())
            return Result(self.invariant, "failed", text[:200])
        return Result(self.invariant, "passed", detail)

    def __call__(self) -> None:
        """Raise AssertionError if it failed; skip, as pytest knows it, if it is not applicable."""
        _, outcome, detail = self.result()
        if outcome != "passed":
            raise AssertionError(detail) if outcome == "failed" else unittest.SkipTest(detail)


def cases(
    make: Make, linear: Callable[[int, int], nn.Module] = nn.Linear, **how: Any
) -> list[Case]:
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
        TypeError: make gives no module.

    Example:
        >>> from minilora import LoRALinear
        >>> [str(case) for case in cases(LoRALinear)][:4]
        ['start', 'frozen', 'parameters', 'learns']
    """

    def base() -> nn.Module:
        torch.manual_seed(0)
        return linear(IN, OUT)

    kit = Kit(make, base, lambda module, x: module(x), **how)
    with torch.random.fork_rng(devices=[]):
        made = make(base(), RANK, ALPHA, 0.0)
    if not isinstance(made, nn.Module):
        raise TypeError(f"make(linear, rank, alpha, dropout) gave a {type(made).__name__}")
    return [Case(name, kit) for name in INVARIANTS]


def check(make: Make, **how: Any) -> Report:
    """Check a layer by every invariant.

    Args:
        make: (linear, rank, alpha, dropout) -> the layer, a module that holds linear or a copy of
            it. NotImplementedError says that it cannot do that, such as dropout.
        how: what the kit cannot find itself, by name:
            linear: (in, out) -> the layer that make is given; `torch.nn.Linear` if not given.
            merge, unmerge: functions of the layer; a method of that name if not given. Either may
                return another module.
            trainable: layer -> the parameters that train; those that require a gradient if not.
            update: layer -> s B A (out, in) as the layer itself reports it; its method `delta`.
            also: names of the parameters that train besides A and B, or the ends of them.
            low_rank: False says that the weight is not W + s B A, as in DoRA.

    Returns:
        The report: it prints, and `report.named("failed")` is empty if nothing failed.

    Raises:
        TypeError: make gives no module, or an argument has another name.

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
        run: model -> its output, always on the same inputs; dropout of the model's own is off.
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
        >>> check_model(model, adapt, lambda model: model(x), **hooks).named("failed")
        []
    """

    def make(base: nn.Module, *_: float) -> nn.Module:
        result = inject(base)
        return result if isinstance(result, nn.Module) else base

    kit = Kit(make, lambda: copy.deepcopy(model), lambda m, _: run(m), is_model=True, **how)
    return Report(Case(name, kit).result() for name in INVARIANTS if name not in OF_A_LAYER)
