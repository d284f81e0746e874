"""Names on disk: of the files and of the tensors; and the comparison with the expected keys."""

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from minilora.config import LoRAConfig, LoRAError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARAMETERS: dict[str, tuple[str, tuple[str, ...], str | None]] = {
    "lora_A": (".lora_A.weight", ("r", "in"), None),
    "lora_B": (".lora_B.weight", ("out", "r"), None),
    "magnitude": (".lora_magnitude_vector", ("out",), "dora"),
    "lora_bias": (".lora_B.bias", ("out",), "lora_bias"),
    "lora_E": (".lora_E", ("r", "1"), "adalora"),
}
"""The parameters of an adapted layer: how the key ends on disk, the shape, and the field of
LoRAConfig that asks for it."""
SUFFIXES = {name: suffix for name, (suffix, _, _) in PARAMETERS.items()}
OF_A_LAYER = re.compile(rf"{re.escape(PREFIX)}(.*)({'|'.join(map(re.escape, SUFFIXES.values()))})")

FOLDERS = ("prompt", "prefix")
"""Subdirectories of an adapter's directory, for methods that adapt no layer."""


def is_beside(key: str) -> bool:
    """Whether a tensor lies in one of these subdirectories: its key begins with the name."""
    return key.startswith(tuple(f"{folder}/" for folder in FOLDERS))


def modules_of(keys: Iterable[str]) -> tuple[str, ...]:
    """Dotted names of the modules that the keys are of, sorted."""
    return tuple(sorted({found[1] for found in map(OF_A_LAYER.fullmatch, keys) if found}))


Expected = dict[str, tuple[tuple[int, ...], bool]]
"""Key -> the tensor's shape, and whether it is floating point."""


def expected_of(config: LoRAConfig, module: str, out: int, in_: int) -> Expected:
    """The keys of an adapted module W (out, in)."""
    sizes = {"r": config.rank_of(module), "in": in_, "out": out, "1": 1}
    return {
        PREFIX + module + suffix: (tuple(sizes[size] for size in shape), True)
        for suffix, shape, field in PARAMETERS.values()
        if field is None or getattr(config, field, False)
    }


def compare(
    expected: Expected, held: Mapping[str, Tensor], explain: Callable[[str], str]
) -> list[str]:
    """What is wrong with each key that is unexpected, missing, or of another shape or kind."""
    unexpected = [f"unexpected key {k}{explain(k)}" for k in sorted(held.keys() - expected.keys())]
    missing = [f"missing key {key}" for key in expected if key not in held]
    wrong = []
    for key in sorted(expected.keys() & held.keys()):
        shape, floating = expected[key]
        if (tuple(held[key].shape), held[key].is_floating_point()) != (shape, floating):
            what = "floating point" if floating else "whole numbers"
            wrong.append(f"{key} is {describe(held[key])}, not {what} of shape {shape}")
    return unexpected + missing + wrong


def refuse(what: str, problems: list[str]) -> None:
    """Raise a LoRAError that names the first problems, if there are any."""
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise LoRAError(f"{what}: {'; '.join(problems[:5])}{more}")


def describe(tensor: Tensor) -> str:
    """'a torch.float32 tensor of shape (8, 16)', for messages."""
    return f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}"
