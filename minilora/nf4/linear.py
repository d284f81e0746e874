"""NF4Linear: a frozen linear layer with its weight in four bits (`nf4/tensor.py` says how)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.fused import compute_dtype, is_transformed
from minilora.nf4.tensor import BLOCK, NF4, pack, scratch, unpack


class _Product(torch.autograd.Function):
    """y = x W^T + b and dL/dx = dL/dy W with W dequantized for each: none is kept between."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, int], *packed: Tensor | None
    ) -> Tensor:
        ctx.shape = shape
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*packed)
        return F.linear(x, _weight(NF4(*packed), shape, x.dtype), bias)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = db = None
        if ctx.needs_input_grad[0]:
            weight = _weight(NF4(*ctx.saved_tensors), ctx.shape, dy.dtype)  # (out, in)
            if torch.is_grad_enabled():  # a second derivative will need it
                weight = weight.clone()
            dx = dy @ weight  # (..., out) (out, in) -> (..., in)
        if ctx.needs_input_grad[1]:
            db = dy.reshape(-1, dy.shape[-1]).sum(dim=0)
        return dx, db, *[None] * (1 + len(NF4._fields))


def _weight(packed: NF4, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Dequantized for one product, and overwritten by the next."""
    size = packed.absmax.numel() * BLOCK
    return unpack(packed, shape, dtype, scratch("weight", size, dtype, packed.codes.device))


class NF4Linear(nn.Module):
    """A frozen linear layer with its weight in four bits. Computes in the dtype of its input.

    y = x W^T + b for x (..., in) and y (..., out), where W (out, in) is what the codes mean
    (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, equations 5 and 6). W is dequantized
    for each product and thrown away: between forward and backward only the four-bit state is kept.
    `.to(dtype)` casts the bias and what `dense_weight` gives, and leaves the state as it is.

    Args:
        linear: the layer to quantize; its bias is kept as it is. On the meta device the state is
            empty, to be loaded: `load_state_dict(..., assign=True)`.
        double: quantize the scales too.
        weight: (out, in), quantized instead of the linear's own.

    Attributes:
        codes, absmax, scales, offset: buffers, their shapes are in `NF4`.
        bias: (out,), or None.
        dtype: what the weight would be in, and what `dense_weight` gives.
        trained: whether the weight required a gradient; it will again when it is dequantized.

    Raises:
        LoRAError: the weight holds an infinity or NaN.

    Example:
        >>> layer = NF4Linear(nn.Linear(64, 16))
        >>> layer(torch.ones(3, 64)).shape, layer.dense_weight().shape
        (torch.Size([3, 16]), torch.Size([16, 64]))
    """

    codes: Tensor
    absmax: Tensor
    scales: Tensor | None
    offset: Tensor | None
    bias: nn.Parameter | None

    mergeable = False  # rounding to sixteen values would lose most of an update

    def __init__(
        self, linear: nn.Linear, double: bool = True, weight: Tensor | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, self.trained = linear.weight.dtype, linear.weight.requires_grad
        weight = linear.weight.detach() if weight is None else weight
        for name, tensor in pack(weight, double)._asdict().items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", linear.bias)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not x.is_meta:  # the meta device has no autocast
            x = x.to(compute_dtype(x))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if is_transformed():
            return F.linear(x, self.dense_weight(x.dtype), bias)
        shape = (self.out_features, self.in_features)
        y: Tensor = _Product.apply(x, bias, shape, *self.packed)  # type: ignore[no-untyped-call]
        return y

    @property
    def packed(self) -> NF4:
        """The state, as `unpack` takes it."""
        return NF4(self.codes, self.absmax, self.scales, self.offset)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight dequantized, as a copy: (out, in)."""
        return unpack(self.packed, (self.out_features, self.in_features), dtype or self.dtype)

    @property
    def weight(self) -> Tensor:
        """For models that look at their linears: shape and dtype (out, in), without the values.

        In a module that computes with it, as some attentions do, `quantize` leaves the linear out.
        """
        size = (self.out_features, self.in_features)
        return torch.empty(size, dtype=self.dtype, device="meta")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "NF4Linear":
        floats = {n: b for n, b in self._buffers.items() if b is not None and b.is_floating_point()}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        for name, before in floats.items():  # rounding a scale would move 64 weights
            now = self._buffers[name]
            assert now is not None
            if now.dtype != before.dtype:
                self._buffers[name] = before.to(now.device)
        return self

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, double={self.scales is not None}"
