"""Is this LoRA right? Nineteen invariants, checked on anybody's layer or model.

    from minilora import conformance
    print(conformance.check(make))  # make(linear, rank, alpha, dropout) -> your layer

Each invariant is passed, failed with the number that shows it, or not applicable with the reason.
What they are stands in `invariants.py`, and in words in docs/conformance.md.

On the command line, with exit code 1 if anything failed:

    python -m minilora conformance FILE.py:make
"""

import copy
import importlib.util
import sys
import unittest
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minilora.invariants import (
    ALPHA,
    IN,
    INVARIANTS,
    OF_A_LAYER,
    OUT,
    RANK,
    Kit,
    Make,
    NotApplicable,
)


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


def main(target: str) -> int:
    """Check `FILE.py:name` or `module:name`: a make, or a mapping of all of `check`'s arguments.

    Returns:
        The exit code: 1 if something failed, else 0.

    Raises:
        LoRAError: there is no such file, module or name, or it cannot be checked.
    """
    from minilora import LoRAError

    place, _, name = target.rpartition(":")
    try:
        if place.endswith(".py"):
            sys.path.insert(0, str(Path(place).parent))  # as `python FILE.py` does
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None
            assert spec.loader is not None
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        found = getattr(module, name)
        report = check(**found) if isinstance(found, Mapping) else check(found)
    except Exception as error:
        text = f"cannot check {target!r}: {type(error).__name__}: {error}"
        raise LoRAError(f"{text}; it should be FILE.py:make or module:make") from error
    print(report)
    return int(bool(report.named("failed")))
