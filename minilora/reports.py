"""What inject, merge and load return. Every report prints."""

import re
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class InjectReport:
    """What `inject` did. Printed: one line of counts, then the modules, layers folded.

    Attributes:
        modules: dotted names of the adapted modules.
        trainable: number of parameters that train.
        total: number of parameters, the adapter's included.
        also: names of the biases and whole modules' parameters that train too.
        seed: the seed of A's start, if one was given.

    Example:
        >>> print(InjectReport(("layers.0.fc", "layers.1.fc"), trainable=5, total=200))
        2 modules, 5 trainable of 200 (2.5000%)
          layers.{0,1}.fc
    """

    modules: tuple[str, ...]
    trainable: int
    total: int
    also: tuple[str, ...] = ()
    seed: int | None = None

    def __str__(self) -> str:
        text = f"{self.trainable:,} trainable of {self.total:,} ({self.trainable / self.total:.4%})"
        lines = fold_names(self.modules) + [f"and {name}" for name in fold_names(self.also)]
        lines += [] if self.seed is None else [f"A starts from seed {self.seed}"]
        return "\n  ".join([f"{count(self.modules)}, {text}", *lines])


@dataclass(frozen=True)
class Rounding:
    """What writing W + Delta W into the weight's dtype cost, measured in float64.

    Attributes:
        module: dotted name.
        largest: largest |merged - (W + Delta W)| of an entry.
        lost: share of the update lost to rounding: ||(merged - W) - Delta W|| / ||Delta W||.
    """

    module: str
    largest: float
    lost: float

    @classmethod
    def of(cls, module: str, before: Tensor, exact: Tensor, written: Tensor) -> "Rounding":
        """From W, W + Delta W, both (out, in) in float64, and what was written."""
        error = written.to(exact.dtype) - exact  # (merged - W) - Delta W is the same difference
        lost = error.norm().item() / ((exact - before).norm().item() or 1.0)
        return cls(module, error.abs().max().item(), lost)


@dataclass(frozen=True)
class MergeReport:
    """The rounding of each merged module. Printed: one line with the worst of them.

    Attributes:
        modules: a `Rounding` each, with `module`, `largest` and `lost`.
        kept: "prompt", "prefix" or both, which cannot be merged and stay; "" if there is none.
    """

    modules: tuple[Rounding, ...]
    kept: str = ""

    def __str__(self) -> str:
        kept = f"; the {self.kept} cannot be merged and stays beside it" if self.kept else ""
        if not self.modules:
            return f"nothing merged{kept}"
        worst = max(self.modules, key=lambda rounding: rounding.lost)
        lost = f"at most {worst.lost:.2g} of an update lost ({worst.module})"
        error = f"rounding error at most {max(r.largest for r in self.modules):.2g} an entry"
        return f"{count(self.modules)} merged; {error}; {lost}{kept}"


@dataclass(frozen=True)
class LoadReport:
    """What `load_adapter` did. Printed: one line.

    Attributes:
        modules: dotted names of the adapted modules.
        swapped: whether the tensors went into adapter layers that were there already.
        base_model: the base model that the file names.
        notice: says so if the file names another base model than this one.
    """

    modules: tuple[str, ...]
    swapped: bool
    base_model: str | None
    notice: str | None = None

    def __str__(self) -> str:
        how = "swapped in place" if self.swapped else "loaded"
        return f"{count(self.modules)} {how}" + (f"; {self.notice}" if self.notice else "")


def count(names: tuple[object, ...], what: str = "module") -> str:
    """'1 module' or '2 modules'."""
    return f"{len(names)} {what}" + "s" * (len(names) != 1)


def fold_names(names: tuple[str, ...]) -> list[str]:
    """Names that differ in their first number only become one line.

    Example:
        >>> fold_names(("layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj"))
        ['layers.{0,1}.q_proj', 'layers.0.v_proj']
    """
    groups: dict[tuple[str, str], list[str]] = {}  # ("layers.", ".q_proj"): ["0", "1"]
    for name in names:
        ((start, number, end),) = re.findall(r"(?s)^(\D*)(\d*)(.*)", name)
        groups.setdefault((start, end), []).append(number)
    return [f"{start}{_fold_numbers(numbers)}{end}" for (start, end), numbers in groups.items()]


def _fold_numbers(numbers: list[str]) -> str:
    if len(numbers) == 1:
        return numbers[0]
    first, *_, last = indices = sorted(map(int, numbers))
    if len(indices) > 2 and indices == list(range(first, last + 1)):
        return f"{{{first}-{last}}}"
    return f"{{{','.join(map(str, indices))}}}"
