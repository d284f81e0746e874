"""BiasedLoRALinear: B has a bias of its own."""

from typing import Any

import torch
from torch import Tensor, nn

from minilora.config import LoRAError
from minilora.layer import LoRALinear


class BiasedLoRALinear(LoRALinear):
    """y = base(x) + s (B A x + c): for adapters made from a full fine-tune, biases included.

    Args:
        base: as in `LoRALinear`, and so are the other arguments.

    Attributes:
        lora_bias: parameter c (out,), zero at the start.

    Raises:
        LoRAError: the base cannot be adapted, or the rank does not fit it.
    """

    untouched_bias: Tensor | None
    """While merged, the base's bias as it was: (out,)."""

    def __init__(self, base: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(base, *args, **kwargs)
        self.lora_bias = nn.Parameter(self.lora_B.new_zeros(self.out_features))
        self.register_buffer("untouched_bias", None, persistent=False)
        self.register_state_dict_post_hook(_write_untouched_bias)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out).

        Raises:
            LoRAError: called to train while merged.
        """
        y = super().forward(x)
        if self.merged or not self.enabled:
            return y
        return y + (self.scale * self.lora_bias).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """W <- W + s B A and b <- b + s c, each rounded once.

        Raises:
            LoRAError: the base has no bias to merge into, or cannot be merged.
        """
        if self.merged:
            return
        bias = self.bias
        if bias is None:
            raise LoRAError("cannot merge: lora_bias needs a bias in the base, which has none")
        super().merge()
        self.untouched_bias = bias.detach().clone()
        c = self.lora_bias.to(torch.promote_types(self.lora_bias.dtype, torch.float32))
        bias.copy_(bias.to(c.dtype) + self.scale * c)

    @torch.no_grad()
    def unmerge(self) -> None:
        """The very same weight and bias back, bit for bit."""
        if self.untouched_bias is not None and self.bias is not None:
            self.bias.copy_(self.untouched_bias)
            self.untouched_bias = None
        super().unmerge()


def _write_untouched_bias(
    layer: nn.Module, state_dict: dict[str, Any], prefix: str, _: object
) -> None:
    assert isinstance(layer, BiasedLoRALinear)
    if layer.untouched_bias is not None:
        state_dict[f"{prefix}base.bias"] = layer.untouched_bias
