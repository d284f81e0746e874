"""LoRABiasLinear: B has a bias of its own."""

import torch
from torch import Tensor, nn

from minilora.config import LoRAError
from minilora.layer import LoRALinear


class LoRABiasLinear(LoRALinear):
    """y = base(x) + s (B A x + c): for adapters made from a full fine-tune, biases included.

    The arguments are those of `LoRALinear`.

    Attributes:
        lora_bias: parameter c (out,), zero at the start.

    Raises:
        LoRAError: the base cannot be adapted, or a number is out of range.
    """

    def add_parameters(self) -> None:
        """The bias c."""
        self.lora_bias = nn.Parameter(self.lora_B.new_zeros(self.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out).

        Raises:
            LoRAError: called to train while merged.
        """
        y = super().forward(x)
        if self.merged or not self.enabled:
            return y
        return y + (self.scale * self.lora_bias).to(y.dtype)

    def merged_bias(self) -> Tensor:
        """The bias b + s c: (out,), float32 or wider.

        Raises:
            LoRAError: the base has no bias to merge into, or the sum does not fit its dtype.
        """
        if self.bias is None:
            raise LoRAError("cannot merge: lora_bias needs a bias in the base, which has none")
        c = self.lora_bias.to(torch.promote_types(self.lora_bias.dtype, torch.float32))
        merged = self.bias.to(c.dtype) + self.scale * c
        if self.bias.isfinite().all() and not merged.to(self.bias.dtype).isfinite().all():
            raise LoRAError(f"b + s c does not fit {self.bias.dtype}: merge in a wider dtype")
        return merged
