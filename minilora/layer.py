"""LoRALinear: a frozen linear layer and its low-rank update."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minilora import bases
from minilora.config import Init, LoRAError, check_alpha, check_dropout, check_rank, scale
from minilora.functional import fused_low_rank, low_rank
from minilora.initialization import initialize
from minilora.quantize import loftq


class LoRALinear(nn.Module):
    """y = base(x) + s B A x: a frozen linear layer W (out, in) with a trainable update s B A.

    Hu et al. 2021 (https://arxiv.org/abs/2106.09685), equation 3; x is (..., in), y (..., out).

    Args:
        base: the layer to adapt; `torch.nn.Linear`, Conv1D, or a `bases.Base`. Its parameters are
            frozen here.
        rank: r, at least 1; above the smaller side of W it only costs.
        alpha: numerator of the scale s = alpha / r.
        dropout: probability in [0, 1) that an input of the branch is dropped, in training only.
        rslora: s = alpha / sqrt(r).
        init: how A and B start; see `LoRAConfig`.

    Attributes:
        base: the wrapped layer.
        lora_A: parameter (r, in). lora_B: parameter (out, r). Float32 (float64 on a float64 base).
        scale: s.
        fused: whether training takes the hand-written backward, True at first.
        enabled: False computes the base alone.

    Raises:
        LoRAError: the base cannot be adapted, or a number is out of range.

    Example:
        >>> layer = LoRALinear(nn.Linear(16, 4), rank=2, alpha=8)
        >>> layer(torch.ones(3, 16)).shape, layer.scale
        (torch.Size([3, 4]), 4.0)
        >>> layer.lora_A.shape, layer.lora_B.shape, layer.delta().shape
        (torch.Size([2, 16]), torch.Size([4, 2]), torch.Size([4, 16]))
        >>> before = layer.base.weight.clone()
        >>> layer.merge()
        >>> layer.unmerge()
        >>> torch.equal(layer.base.weight, before)
        True
    """

    fused: bool = True
    """Train by `fused_low_rank`, with the hand-written backward: less time, less memory. False, on
    this layer or on the class for all, trains by `low_rank`, as evaluation mode always computes:
    bit for bit what PEFT computes, in the same order."""

    untouched: Tensor | None
    """While merged, the base's weight as it was: (out, in). A buffer, so that `.to()` moves it."""

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float = 32.0,
        dropout: float = 0.0,
        *,
        rslora: bool = False,
        init: Init = "kaiming",
    ) -> None:
        super().__init__()
        if not bases.is_linear(base):
            raise LoRAError(f"cannot adapt a {type(base).__name__}: it is not a linear layer")
        check_rank("rank", rank)
        check_alpha("alpha", alpha)
        check_dropout("dropout", dropout)
        out, in_ = bases.shape(base)
        device, dtype = bases.adapter_placement(base)
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(rank, in_, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(out, rank, device=device, dtype=dtype))
        self.dropout = dropout
        self.rank, self.alpha = rank, alpha
        self.scale = scale(alpha, rank, rslora)
        self.enabled = True  # False inside `with minilora.disabled(model)`
        self.register_buffer("untouched", None, persistent=False)
        self.register_state_dict_post_hook(_write_untouched_weight)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(refuse_when_merged)  # type: ignore[no-untyped-call]
        initialize(self.lora_A.data, self.lora_B.data, init)
        if init == "loftq":
            self.base = loftq(base, self.lora_A.data, self.lora_B.data, self.scale)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out).

        Raises:
            LoRAError: called to train while merged: A and B would get no gradient.
        """
        if self.merged and self.training and torch.is_grad_enabled():
            raise LoRAError("cannot train while merged: call minilora.unmerge(model) first")
        y: Tensor = self.base(x)  # (..., out)
        if self.merged or not self.enabled:
            return y
        if not self.training:
            return low_rank(y, x, self.lora_A, self.lora_B, self.scale)
        branch = fused_low_rank if self.fused else low_rank
        return branch(y, x, self.lora_A, self.lora_B, self.scale, self.dropout)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Delta W = s B A: (out, in), float32 or wider, on the layer's device."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        with torch.autocast(self.lora_A.device.type, enabled=False):
            update = self.lora_B.to(wide) @ self.lora_A.to(wide)  # (out, r) (r, in) -> (out, in)
            return update * self.scale

    def adapted(self, weight: Tensor) -> Tensor:
        """W + s B A for the untouched W: (out, in), float32 or wider."""
        delta = self.delta()
        return weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta

    @property
    def merged(self) -> bool:
        """Whether the base's weight holds W + s B A just now."""
        return self.untouched is not None

    @torch.no_grad()
    def merge(self) -> None:
        """W <- W + s B A, in the same storage: summed in float32 or wider, rounded once.

        Merging a merged layer changes nothing.

        Raises:
            LoRAError: the base is quantized, or the sum does not fit the weight's dtype.
        """
        if self.merged:
            return
        if not bases.is_mergeable(self.base):
            raise LoRAError(
                f"cannot merge into a {type(self.base).__name__}: its weight is quantized, and the "
                "rounding would swallow the update; minilora.unwrap(model, dequantize=True) "
                "merges into a plain linear"
            )
        weight = bases.dense_weight(self.base)  # (out, in), a view
        merged = self.adapted(weight).to(weight.dtype)
        if weight.isfinite().all() and not merged.isfinite().all():
            raise LoRAError(f"W + s B A does not fit {weight.dtype}: merge in a wider dtype")
        self.untouched = weight.clone()
        weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """The very same weight back, bit for bit. Unmerging an unmerged layer changes nothing."""
        if self.untouched is not None:
            bases.dense_weight(self.base).copy_(self.untouched)
            self.untouched = None

    # Some models look at their linears: T5 casts to `wo.weight.dtype`.
    @property
    def weight(self) -> Tensor:
        """The base's weight (merged if merged)."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        """The base's input width, `in`."""
        return bases.shape(self.base)[1]

    @property
    def out_features(self) -> int:
        """The base's output width, `out`."""
        return bases.shape(self.base)[0]

    def extra_repr(self) -> str:
        """What `print(model)` shows between the parentheses."""
        state = ", merged" if self.merged else ""
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}{state}"


def _write_untouched_weight(
    layer: nn.Module, state_dict: dict[str, Any], prefix: str, _: object
) -> None:
    """A checkpoint holds the base and the adapter, never their sum."""
    assert isinstance(layer, LoRALinear)
    if layer.untouched is not None:
        weight = layer.untouched
        state_dict[f"{prefix}base.weight"] = weight.T if bases.is_conv1d(layer.base) else weight


def refuse_when_merged(
    layer: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object
) -> None:
    """A weight loaded now would be lost at the next `unmerge`."""
    assert isinstance(layer, LoRALinear)
    if layer.merged and any(key.startswith(prefix) for key in state_dict):
        raise LoRAError("cannot load weights while merged: call minilora.unmerge(model) first")
