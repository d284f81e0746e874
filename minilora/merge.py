"""Merge, unmerge and disable the adapter over a whole model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from minilora import linears
from minilora.config import LoRAError
from minilora.inject import enable_extras, injection_of, lora_layers, merge_layers, unmergeable
from minilora.layer import LoRALinear
from minilora.reports import MergeReport, Rounding


def merge(model: nn.Module) -> MergeReport:
    """Add every update s B A to its weight, in place: W <- (W + s B A) rounded once.

    The storage stays the same, and a forward pass takes as long as the base's. The sum is taken in
    float32 (float64 for a float64 weight) and rounded to the weight's dtype once. The original
    weight is kept for `unmerge`, in as much memory again. Merging twice is harmless.

    Args:
        model: as `inject` or `load_adapter` left it.

    Returns:
        The rounding of every module, and the prompt or prefix that cannot be merged and stays.

    Raises:
        LoRAError: the model carries no adapter, or a weight cannot be merged (then none is).

    Example:
        >>> from minilora import LoRAConfig, inject
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
        >>> _ = inject(model, LoRAConfig(rank=2, targets=("q_proj",)))
        >>> report = merge(model)
        >>> [rounding.module for rounding in report.modules], model["q_proj"].merged
        (['q_proj'], True)
    """
    return MergeReport(tuple(merge_layers(_layers(model), rounding_of)), unmergeable(model))


def unmerge(model: nn.Module) -> None:
    """Restore the base weights, bit for bit, in every dtype.

    They are copied from where `merge` kept them; subtracting s B A again would leave rounding
    errors. Unmerging twice is harmless.

    Args:
        model: as `merge` left it.

    Raises:
        LoRAError: the model carries no adapter.

    Example:
        >>> from minilora import LoRAConfig, inject
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)}).to(torch.bfloat16)
        >>> before = model["q_proj"].weight.clone()
        >>> _ = inject(model, LoRAConfig(rank=2, targets=("q_proj",), init="random"))
        >>> _ = merge(model)
        >>> torch.equal(model["q_proj"].weight, before)
        False
        >>> unmerge(model)
        >>> torch.equal(model["q_proj"].weight, before)
        True
    """
    for layer in _layers(model).values():
        layer.unmerge()


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes what the base computes, without a copy of it.

    On exit each layer returns to its previous state, merged or disabled. Trained biases and modules
    are also replaced by the base's inside the block, and prompts and prefixes are switched off.

    Args:
        model: as `inject` or `load_adapter` left it.

    Raises:
        LoRAError: the model carries no adapter.

    Example:
        >>> from minilora import LoRAConfig, inject
        >>> model, x = nn.ModuleDict({"q_proj": nn.Linear(8, 8)}), torch.ones(8)
        >>> base = model["q_proj"](x)
        >>> _ = inject(model, LoRAConfig(rank=2, targets=("q_proj",), init="random"))
        >>> with disabled(model):
        ...     print(torch.equal(model["q_proj"](x), base))
        True
        >>> torch.equal(model["q_proj"](x), base)
        False
    """
    before = [(layer, layer.enabled, layer.merged) for layer in _layers(model).values()]
    extras_enabled = enable_extras(model, False)  # False in a nested block
    try:
        for layer, _, _ in before:
            layer.unmerge()
            layer.enabled = False
        yield
    finally:
        enable_extras(model, extras_enabled)
        for layer, enabled, _ in before:
            layer.enabled = enabled
        for layer, _, merged in before:
            if merged:
                layer.merge()


def _layers(model: nn.Module) -> dict[str, LoRALinear]:
    layers = lora_layers(model)
    if not layers and injection_of(model) is None:
        raise LoRAError("the model carries no adapter: minilora.inject or load_adapter first")
    return layers


def rounding_of(name: str, layer: LoRALinear, dtype: torch.dtype | None = None) -> Rounding:
    """What merging cost in a merged layer, and a cast of the sum to `dtype` afterwards."""
    assert layer.original_weight is not None
    wide = torch.float32 if layer.lora_A.device.type == "mps" else torch.float64  # MPS has none
    before = layer.original_weight.to(wide)  # (out, in)
    written = linears.dense_weight(layer.base).to(dtype=dtype)
    return Rounding.of(name, before, layer.merged_weight(before), written)
