"""DoRALinear: the length and the direction of each row of the weight train separately."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora import linears
from minilora.functional import low_rank
from minilora.layer import LoRALinear


class DoRALinear(LoRALinear):
    """y = g (W + s B A) x + b with g = m / ||W + s B A|| (Liu et al. 2024, equation 5).

    The norm is that of each row (the paper writes W transposed and speaks of columns). It takes
    part in the forward pass as a constant (section 4.3): no gradient flows through it. At the start
    m is the norm, so that g = 1 and the layer computes what LoRALinear computes.

    The arguments are those of `LoRALinear`.

    Attributes:
        magnitude: parameter m (out,).

    Raises:
        LoRAError: the base cannot be adapted, or a number is out of range.
    """

    squares: Tensor
    """||W||^2 of each row: (out,), float32 or wider. Kept, since W does not change."""

    def add_parameters(self) -> None:
        """Magnitude, which starts as the norm."""
        self.register_buffer("squares", self._squares(), persistent=False)
        self.register_load_state_dict_post_hook(_recount)  # type: ignore[no-untyped-call]
        self.magnitude = nn.Parameter(self.norm().to(self.lora_A.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out).

        Raises:
            LoRAError: called to train while merged.
        """
        if self.merged or not self.enabled:
            return super().forward(x)
        y: Tensor = self.base(x)  # (..., out)
        dropped = F.dropout(x, self.dropout, training=self.training)  # (..., in)
        v = self.base(dropped) if self.training and self.dropout else y
        if self.bias is not None:
            v = v - self.bias.to(v.dtype)  # W x: the length is the weight's alone
        update = low_rank(v, dropped, self.lora_A, self.lora_B, self.scale)  # (W + s B A) x
        return y - v + (self.gain(self.norm()) * update).to(y.dtype)

    def gain(self, norm: Tensor) -> Tensor:
        """The factor g = m / ||W + s B A|| of each row: (out,). A row of zeros stays one."""
        return self.magnitude / norm.masked_fill(norm == 0, 1)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """||W + s B A|| of each row: (out,), without building B A.

        ||w + s b A||^2 = ||w||^2 + 2 s <w A^T, b> + s^2 <b (A A^T), b> for a row w of W and b of B.
        """
        # The meta device has no autocast.
        with torch.autocast(self.lora_A.device.type.replace("meta", "cpu"), enabled=False):
            A, B = self.lora_A.to(self.squares.dtype), self.lora_B.to(self.squares.dtype)
            WA = self._original().to(A.dtype) @ A.T  # (out, in) (in, r) -> (out, r)
            cross = (WA * B).sum(dim=1)  # (out,)
            update = ((B @ (A @ A.T)) * B).sum(dim=1)  # (out,)
            squares = self.squares + 2 * self.scale * cross + self.scale**2 * update
            return squares.clamp(min=0).sqrt()  # rounding must not make a square negative

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Delta W = g (W + s B A) - W: (out, in), float32 or wider."""
        weight = self._original()
        return self.merged_weight(weight) - weight

    @torch.no_grad()
    def merged_weight(self, weight: Tensor) -> Tensor:
        """The adapted weight g (W + s B A) for the original W: (out, in), float32 or wider."""
        delta = super().delta()
        v = weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta
        norm: Tensor = torch.linalg.vector_norm(v, dim=1)  # (out,)
        return self.gain(norm)[:, None] * v  # (out, 1) (out, in)

    def _original(self) -> Tensor:
        weight = self.original_weight
        return linears.dense_weight(self.base) if weight is None else weight

    def _squares(self) -> Tensor:
        weight = self._original()
        wide = torch.promote_types(weight.dtype, torch.float32)
        norm: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=wide)  # (out,)
        return norm.square()

    def _apply(self, *args: Any, **kwargs: Any) -> "DoRALinear":
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.squares = self._squares()  # `.to(dtype)` rounded W, and would round the squares too
        return self


def _recount(layer: nn.Module, _: object) -> None:
    """Another W was loaded, and so the norm is another."""
    assert isinstance(layer, DoRALinear)
    layer.squares = layer._squares()
