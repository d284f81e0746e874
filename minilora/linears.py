"""What a LoRALinear may wrap: any module that computes y = x W^T + b and exposes W.

These are `torch.nn.Linear`; GPT-2's `Conv1D`, the same product with the weight stored as (in, out);
and any module with the attributes of `LinearLike`, such as a quantized linear.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from minilora.config import LoRAError


@runtime_checkable
class LinearLike(Protocol):
    """The protocol for other linears, such as one that holds its weight in four bits."""

    in_features: int
    out_features: int
    mergeable: bool
    """True if `dense_weight` returns the storage that forward reads, so that a write changes the
    layer; False if it returns a copy."""

    def dense_weight(self) -> Tensor:
        """W (out, in)."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is the Conv1D of transformers, which is not imported here.

    A convolution of this name has no `nf`, which is transformers' name for the output width.
    """
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether the module can be wrapped."""
    return isinstance(module, nn.Linear | LinearLike) or is_conv1d(module)


def dense_weight(base: nn.Module) -> Tensor:
    """W (out, in) as a view, so that writing to it changes the module (a copy if quantized)."""
    if isinstance(base, LinearLike):
        return base.dense_weight()
    weight: Tensor = base.weight  # type: ignore[assignment]
    return weight.detach().T if is_conv1d(base) else weight.detach()


def shape(base: nn.Module) -> tuple[int, int]:
    """(out, in)."""
    if isinstance(base, nn.Linear | LinearLike):
        return base.out_features, base.in_features
    return dense_weight(base).shape  # type: ignore[return-value]


def is_mergeable(base: nn.Module) -> bool:
    """Whether the adapter can be added into the stored weight."""
    return base.mergeable if isinstance(base, LinearLike) else True


def adapter_placement(base: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where A and B live: on the base's device, in float32 (float64 on a float64 base).

    Raises:
        LoRAError: the module is not a linear layer, its weight is computed by a parametrization,
            or the weight's dtype is not supported.
    """
    cannot = f"cannot adapt {type(base).__name__}"
    if isinstance(base, LinearLike):
        return next(iter([*base.parameters(), *base.buffers()])).device, torch.float32
    if not is_linear(base):
        raise LoRAError(f"{cannot}: it is not a linear layer; name linear layers instead")
    if "weight" not in base._parameters | base._buffers:
        raise LoRAError(f"{cannot}: its weight is computed by a parametrization: remove it")
    weight = dense_weight(base)
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        what = "they must be floating point of 16 bits or more; load the model unquantized"
        raise LoRAError(f"{cannot} with {weight.dtype} weights: {what}")
    return weight.device, torch.promote_types(weight.dtype, torch.float32)
