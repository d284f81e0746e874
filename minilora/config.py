"""LoRAConfig: what to adapt and how, in the paper's terms.

How the fields enter the equation y = x W^T + b + s (dropout(x) A^T) B^T of `functional.py`:

    rank, rank_pattern               r, the rows of A and the columns of B
    alpha, alpha_pattern, rslora     s = alpha / r, or alpha / sqrt(r)
    dropout                          the probability that an element of x is left out
    init                             the values of A and B before training
    targets, exclude, layers, ...    which layers of the model get an A and a B
    bias, also_train                 what of the base trains too, such as b
    dora, lora_bias                  another equation: see `methods/`
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Init = Literal["kaiming", "gaussian", "random", "loftq", "pissa"]
Bias = Literal["none", "lora_only", "all"]
ALL_LINEAR = "all-linear"
ATTENTION = "attention"


class LoRAError(ValueError):
    """Invalid input: one line that says what is wrong, where, and what to do.

    Args:
        message: may quote names from a file; what is not printable is shown as an escape.

    Example:
        >>> LoRAConfig(rank=0)
        Traceback (most recent call last):
        minilora.config.LoRAError: rank must be a whole number of at least 1, not 0
    """

    def __init__(self, message: str) -> None:
        # A name in a file may hold any character; the message stays one printable line.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


@dataclass(frozen=True)
class LoRAConfig:
    """How to adapt a model by low-rank updates (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    Every adapted weight W (out, in) becomes W + s B A with A (r, in), B (out, r) and the scale
    s = alpha / r, or alpha / sqrt(r) with `rslora`.

    Args:
        rank: r, at least 1.
        alpha: numerator of the scale, above 0.
        dropout: dropout probability, in [0, 1), on the elements of x that A reads.
        targets: which linear modules. A sequence of names (the exact dotted name or its end after
            a dot), one string (a regular expression that matches the whole name), "all-linear"
            (every linear but the output head), or "attention" (the query and value linears, by the
            names that `conventions.py` knows; inject replaces it with the names in the model).
        exclude: modules to leave alone among the targets; names or a regular expression.
        layers: only the layers with these indices. The index is the first number in the dotted
            name, such as 3 in `layers.3.q_proj`. In an encoder-decoder they apply to both sides.
            Not with a regular expression or "all-linear" in `targets`.
        layers_pattern: names that may stand before the index, such as "layers"; any if empty.
        rank_pattern: other ranks for some modules, {regular expression on the name's end: rank}.
            The first key that matches wins.
        alpha_pattern: the same for alpha.
        rslora: s = alpha / sqrt(r) (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        dora: train the magnitude of each row of W separately from its direction (Liu et al. 2024,
            https://arxiv.org/abs/2402.09353).
        bias: which of the base's biases train: "none", "lora_only" (of the adapted modules), "all".
        lora_bias: give B a bias of its own. Not with `dora`.
        also_train: modules that train whole, such as a new "classifier"; names as in `targets`.
            Neither they nor the modules inside them are adapted.
            With a `task_type` that needs a new head, inject adds the head, as PEFT does.
        token_rows: indices of rows that train in the input embeddings, and in the output head if it
            is tied to them, such as those of new tokens. PEFT's trainable_token_indices.
        init: "kaiming" (A Kaiming-uniform, B zero), "gaussian" (A normal, B zero), "random"
            (both Kaiming-uniform: the model's output changes at once; for tests), "loftq" (the
            base is quantized to NF4, and s B A starts as an approximation of the error), or "pissa"
            (from the largest singular values of W; the output does not change: `methods/pissa.py`).
        task_type: PEFT's task type, such as "SEQ_2_SEQ_LM"; stored in the adapter's file.
        prompts: configurations of a prompt and a prefix, which adapt no layer; `inject` sets them
            when it gets a list.

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
    targets: str | tuple[str, ...] = ATTENTION
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
    token_rows: tuple[int, ...] = ()
    init: Init = "kaiming"
    task_type: str | None = None
    prompts: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        for name in RULES:
            if hasattr(value := getattr(self, name), "tolist"):  # a number or array of NumPy's
                self._set(name, value.tolist())
            check(name, getattr(self, name))
        for name in ("targets", "exclude", "layers", "layers_pattern", "also_train", "token_rows"):
            self._set(name, _as_tuple(name, getattr(self, name)))
        for pattern in self.layers_pattern:
            check_regex("layers_pattern", pattern, "({})")
        for name, rule in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
            self._set(name, dict(getattr(self, name)))
            for key, value in getattr(self, name).items():
                check_regex(name, key, "({})")  # in a group, as `matches_end` uses it
                check(f"{name}[{key!r}]", value, rule)
        if not self.targets and not self.prompts:
            raise LoRAError("targets is empty: name at least one module, such as 'q_proj'")
        if self.layers is not None and isinstance(self.targets, str) and self.targets != ATTENTION:
            raise LoRAError("layers needs targets as a list of names, not as one string")
        if self.layers is None and self.layers_pattern:
            raise LoRAError("layers_pattern has no effect without layers: give layers too")
        if self.lora_bias and (self.dora or self.init not in ("kaiming", "random")):
            raise LoRAError("lora_bias goes with init 'kaiming' or 'random', and not with dora")
        if self.dora and self.init == "pissa":
            raise LoRAError("init 'pissa' does not go with dora: choose one")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen for everybody else

    def rank_of(self, module: str) -> int:
        """The rank of a module, from the first pattern that matches the end of its name."""
        ranks = (rank for key, rank in self.rank_pattern.items() if matches_end(key, module))
        return next(ranks, self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha of a module, in the same way."""
        alphas = (alpha for key, alpha in self.alpha_pattern.items() if matches_end(key, module))
        return next(alphas, self.alpha)


# How an entry selects a module, as in PEFT. For "model.layers.0.q_proj":
#     `targets` or `exclude` as one string: a regular expression for the whole name, r".*q_proj"
#         (`matches`)
#     each entry of a sequence: the exact name, or its end after a dot, "q_proj" or "0.q_proj"
#         (`is_named`)
#     each key of a pattern: a regular expression for the name or such an end, r"[01]\.q_proj"
#         (`matches_end`)


def matches(names: str | tuple[str, ...], module: str) -> bool:
    """Whether a regular expression, or one entry of a sequence, selects the module.

    Example:
        >>> matches(("proj",), "layers.0.proj"), matches(("proj",), "layers.0.q_proj")
        (True, False)
    """
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(is_named(name, module) for name in names)


def is_named(name: str, module: str) -> bool:
    """Whether an entry of a sequence is the module's exact name, or its end after a dot."""
    return f".{module}".endswith(f".{name}")


def matches_end(key: str, module: str) -> bool:
    """Whether a key of a pattern selects the module."""
    return re.match(rf"(.*\.)?({key})$", module) is not None


def check(name: str, value: Any, rule: str | None = None) -> None:
    """Refuse a value that breaks the rule of this name, or another field's."""
    holds, wanted = RULES[rule or name]
    if not holds(value):
        raise LoRAError(f"{name} must be {wanted}, not {value!r}")


def check_regex(name: str, value: str, used: str = "{}") -> None:
    """Raise if the value is not a valid regular expression where `used` puts it."""
    try:
        re.compile(used.format(value))
    except re.error as error:
        raise LoRAError(f"{name}: {value!r} is not a regular expression: {error}") from None


def _as_tuple(name: str, value: Any) -> Any:
    """The value as a tuple, or as the one string it is; a set is sorted: runs are reproducible."""
    if isinstance(value, str) and name in ("targets", "exclude"):
        check_regex(name, value)
        return ALL_LINEAR if value.lower() == ALL_LINEAR else value
    if value in ("", None):
        return None if name == "layers" else ()
    if isinstance(value, str | int):
        return (value,)
    return tuple(sorted(value) if isinstance(value, set | frozenset) else value)


def _is(type_: Any, value: Any) -> bool:
    """Python counts True and False among the integers; a rank is not one of them."""
    return isinstance(value, type_) and not isinstance(value, bool)


def _all_are(type_: Any, value: Any) -> bool:
    return isinstance(value, Collection) and all(_is(type_, item) for item in value)


Rule = tuple[Callable[[Any], bool], str]
_NAMES: Rule = (lambda v: _all_are(str, v), "a string or a sequence of strings")
_MAPPING: Rule = (lambda v: isinstance(v, Mapping) and _all_are(str, v), "{regex: number}")
_NUMBERS: Rule = (lambda v: _is(int | None, v) or _all_are(int, v), "a list of whole numbers")
_FLAG: Rule = (lambda v: isinstance(v, bool), "True or False")
RULES: dict[str, Rule] = {
    "rank": (lambda v: _is(int, v) and v >= 1, "a whole number of at least 1"),
    "alpha": (lambda v: _is(int | float, v) and 0 < v < 1e308, "a finite number above 0"),
    "dropout": (lambda v: _is(int | float, v) and 0 <= v < 1, "in [0, 1)"),
    "init": (lambda v: v in get_args(Init), f"one of {', '.join(get_args(Init))}"),
    "bias": (lambda v: v in get_args(Bias), f"one of {', '.join(get_args(Bias))}"),
    "task_type": (lambda v: isinstance(v, str | None), "a string"),
    **dict.fromkeys(("targets", "exclude", "layers_pattern", "also_train"), _NAMES),
    **dict.fromkeys(("layers", "token_rows"), _NUMBERS),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), _MAPPING),
    **dict.fromkeys(("rslora", "dora", "lora_bias"), _FLAG),
}
"""Field -> a test of its value, and a description of valid values for the error message."""
