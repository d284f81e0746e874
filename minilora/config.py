"""LoRAConfig: what to adapt and how, in the paper's terms. Validates itself."""

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

Init = Literal["kaiming", "gaussian", "random", "loftq"]
Bias = Literal["none", "lora_only", "all"]
ALL_LINEAR = "all-linear"
T = TypeVar("T")


class LoRAError(ValueError):
    """Something asked of minilora is wrong: one line that says what, where and what to do.

    A ValueError, so that whoever catches those catches it too.

    Args:
        message: may quote names from a file; what is not printable is shown as an escape.

    Example:
        >>> LoRAConfig(rank=0)
        Traceback (most recent call last):
        minilora.config.LoRAError: rank must be a whole number of at least 1, not 0
    """

    def __init__(self, message: str) -> None:
        # A name in a file may hold anything; what is printed stays one line of plain characters.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


@dataclass(frozen=True)
class LoRAConfig:
    """How to adapt a model by low-rank updates (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    Every adapted weight W (out, in) becomes W + s B A with A (r, in), B (out, r) and the scale
    s = alpha / r, or alpha / sqrt(r) with `rslora`.

    Args:
        rank: r, at least 1.
        alpha: numerator of the scale, above 0.
        dropout: probability in [0, 1) that an input of the branch x -> s B A x is dropped.
        targets: which linear modules. A sequence of names (the exact dotted name or its end after
            a dot), one string (a regular expression that matches the whole name), or "all-linear"
            (every linear but the output head).
        exclude: modules to leave alone among the targets; names or a regular expression.
        layers: only the layers with these indices: the first `.name.<index>.` of the dotted name.
            In an encoder-decoder that reaches both sides. Goes with a list of targets only.
        layers_pattern: names that may stand before the index, such as "layers"; any if empty.
        rank_pattern: other ranks for some modules, {regular expression on the name's end: rank}.
            The first key that matches wins.
        alpha_pattern: the same for alpha.
        rslora: s = alpha / sqrt(r) (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        dora: train the length of each row of W apart from its direction (Liu et al. 2024,
            https://arxiv.org/abs/2402.09353).
        bias: which of the base's biases train: "none", "lora_only" (of the adapted modules), "all".
        lora_bias: give B a bias of its own. Not with `dora`.
        also_train: modules that train whole, such as a new "classifier": ends of their names. Never
            adapted themselves, nor what lies inside.
        init: "kaiming" (A Kaiming-uniform, B zero), "gaussian" (A normal, B zero), "random"
            (both Kaiming-uniform: the model's output changes at once; for tests), or "loftq" (the
            base is quantized to NF4, and s B A starts as what that rounded away).
        task_type: PEFT's word for the kind of model, such as "SEQ_2_SEQ_LM"; only written down.

    Raises:
        LoRAError: a value is out of range or of the wrong type; the message names the field.

    Example:
        >>> config = LoRAConfig(rank=8, alpha=32, targets=["q_proj"], rank_pattern={"0.q_proj": 4})
        >>> config.rank_of("layers.0.q_proj"), config.rank_of("layers.1.q_proj")
        (4, 8)
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ("q_proj", "v_proj")
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    bias: Bias = "none"
    lora_bias: bool = False
    also_train: tuple[str, ...] = ()
    init: Init = "kaiming"
    task_type: str | None = None

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "layers_pattern", "also_train"):
            self._set(name, _names(name, getattr(self, name)))
        if isinstance(self.targets, str) and self.targets.lower() == ALL_LINEAR:
            self._set("targets", ALL_LINEAR)
        for name in ("layers_pattern", "also_train"):
            if isinstance(value := getattr(self, name), str):
                self._set(name, (value,) if value else ())
        for pattern in self.layers_pattern:
            check_regex("layers_pattern", pattern, "({})")
        if self.layers is not None:
            self._set("layers", _indices(self.layers))
        if not self.targets:
            raise LoRAError("targets is empty: name at least one module, such as 'q_proj'")
        if self.layers is not None and isinstance(self.targets, str):
            raise LoRAError("layers goes with a list of target names, not with one string")
        if self.layers_pattern and self.layers is None:
            raise LoRAError("layers_pattern says where `layers` are counted: give layers too")
        check_rank("rank", self.rank)
        check_alpha("alpha", self.alpha)
        for name, check in (("rank_pattern", check_rank), ("alpha_pattern", check_alpha)):
            self._set(name, _pattern(name, getattr(self, name)))
            for key, value in getattr(self, name).items():
                check(f"{name}[{key!r}]", value)
        check_dropout("dropout", self.dropout)
        for flag in (f.name for f in fields(self) if f.type is bool):
            if not isinstance(getattr(self, flag), bool):
                raise LoRAError(f"{flag} must be True or False, not {getattr(self, flag)!r}")
        for name, choices in (("init", get_args(Init)), ("bias", get_args(Bias))):
            if getattr(self, name) not in choices:
                names = ", ".join(choices)
                raise LoRAError(f"{name} must be one of {names}, not {getattr(self, name)!r}")
        if not isinstance(self.task_type, str | None):
            raise LoRAError(f"task_type must be a string, not {self.task_type!r}")
        if self.lora_bias and self.dora:
            raise LoRAError("lora_bias does not go with dora: a bias has no direction")
        if self.lora_bias and self.init not in ("kaiming", "random"):
            raise LoRAError("lora_bias goes with init 'kaiming' or 'random', as in PEFT")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen for everybody else

    def rank_of(self, module: str) -> int:
        """The rank of the module with this dotted name."""
        return first_match(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha of the module with this dotted name."""
        return first_match(self.alpha_pattern, module, self.alpha)


def scale(alpha: float, rank: int, rslora: bool = False) -> float:
    """The scale s = alpha / r (Hu et al. 2021, section 4.1), or alpha / sqrt(r) (rsLoRA)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def first_match(patterns: Mapping[str, T], module: str, default: T) -> T:
    """The value of the first pattern that matches the end of the module's name."""
    return next((value for key, value in patterns.items() if matches_end(key, module)), default)


def matches(names: str | tuple[str, ...], module: str) -> bool:
    """Whether a dotted module name is meant by `names`.

    A string is a regular expression for the whole name; in a sequence each entry is the exact name
    or its end after a dot.
    """
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def matches_end(key: str, module: str) -> bool:
    """Whether a key of a pattern means this module: PEFT's rule, to the letter."""
    return re.match(rf"(.*\.)?({key})$", module) is not None


def check_rank(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LoRAError(f"{name} must be a whole number of at least 1, not {value!r}")


def check_alpha(name: str, value: Any) -> None:
    if not _is_number(value) or not 0 < value <= sys.float_info.max:
        raise LoRAError(f"{name} must be a finite number above 0, not {value!r}")


def check_dropout(name: str, value: Any) -> None:
    if not _is_number(value) or not 0 <= value < 1:
        raise LoRAError(f"{name} must be in [0, 1), not {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _names(name: str, value: object) -> str | tuple[str, ...]:
    """One string as it is, several as a tuple; a set is sorted, so that a run can be repeated."""
    if isinstance(value, str):
        check_regex(name, value)
        return value
    if not isinstance(value, Iterable) or not all(isinstance(item, str) for item in value):
        raise LoRAError(f"{name} must be a string or a sequence of strings, not {value!r}")
    return tuple(sorted(value) if isinstance(value, set | frozenset) else value)


def check_regex(name: str, value: str, used: str = "{}") -> None:
    try:
        re.compile(used.format(value))
    except re.error as error:
        raise LoRAError(f"{name}: {value!r} is no regular expression: {error}") from None


def _indices(value: object) -> tuple[int, ...]:
    items = (value,) if isinstance(value, int) else value
    if not isinstance(items, Iterable) or not all(type(item) is int for item in items):
        raise LoRAError(f"layers must be a sequence of whole numbers, not {value!r}")
    return tuple(items)


def _pattern(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise LoRAError(f"{name} must map regular expressions to numbers, not {value!r}")
    for key in value:
        check_regex(name, key, "({})")  # in a group, as `first_match` does
    return dict(value)
