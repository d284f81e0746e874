"""The keys of an adapter's tensors: which are expected, and what is wrong with those held."""

import re
from collections.abc import Callable, Mapping
from itertools import zip_longest

from torch import Tensor

from minilora.config import LoRAConfig, LoRAError

PREFIX = "base_model.model."
# How the key of each parameter of a layer ends on disk.
SUFFIXES = {
    "lora_A": ".lora_A.weight",
    "lora_B": ".lora_B.weight",
    "magnitude": ".lora_magnitude_vector",
    "lora_bias": ".lora_B.bias",
}
OF_A_LAYER = re.compile(rf"{re.escape(PREFIX)}(.*)({'|'.join(map(re.escape, SUFFIXES.values()))})")


def modules_of(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Dotted names of the modules that have keys among the tensors, sorted."""
    return tuple(sorted({found[1] for found in map(OF_A_LAYER.fullmatch, tensors) if found}))


Expected = dict[str, tuple[tuple[int, ...], bool]]
"""Of each key the shape, and whether its tensor is floating point."""


def expected_of(config: LoRAConfig, module: str, out: int, in_: int) -> Expected:
    """The keys of an adapted module W (out, in)."""
    rank = config.rank_of(module)
    shapes: dict[str, tuple[int, ...]] = {"lora_A": (rank, in_), "lora_B": (out, rank)}
    shapes |= {"magnitude": (out,)} if config.dora else {}
    shapes |= {"lora_bias": (out,)} if config.lora_bias else {}
    return {PREFIX + module + SUFFIXES[name]: (shape, True) for name, shape in shapes.items()}


def compare(
    expected: Expected, held: Mapping[str, Tensor], explain: Callable[[str], str]
) -> list[str]:
    """What is wrong with each key that is unexpected, missing, or of another shape or kind.

    The three kinds take turns, so that the first few problems show each of them.
    """
    unexpected = [f"unexpected key {k}{explain(k)}" for k in sorted(held.keys() - expected.keys())]
    missing = [f"missing key {key}" for key in expected if key not in held]
    wrong = []
    for key in sorted(expected.keys() & held.keys()):
        shape, floating = expected[key]
        if (tuple(held[key].shape), held[key].is_floating_point()) != (shape, floating):
            what = "floating point" if floating else "whole numbers"
            wrong.append(f"{key} is {kind(held[key])}, not {what} of shape {shape}")
    turns = zip_longest(unexpected, missing, wrong)
    return [problem for turn in turns for problem in turn if problem]


def refuse(what: str, problems: list[str], show: int = 5) -> None:
    """Raise a LoRAError that names the first problems, if there are any."""
    if problems:
        more = f"; and {len(problems) - show} more" if len(problems) > show else ""
        raise LoRAError(f"{what}: {'; '.join(problems[:show])}{more}")


def kind(tensor: Tensor) -> str:
    """'a torch.float32 tensor of shape (8, 16)', for messages."""
    return f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}"
