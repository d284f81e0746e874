"""PiSSALinear: A and B start from the largest singular values of W; the base keeps the rest.

Meng et al. 2024, https://arxiv.org/abs/2404.02948.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minilora import linears
from minilora.config import LoRAError
from minilora.functional import scale
from minilora.layer import LoRALinear
from minilora.nf4.loftq import approximate
from minilora.peft_format.directory import Adapter
from minilora.peft_format.keys import PREFIX, SUFFIXES


class PiSSALinear(LoRALinear):
    """y = (W_res + s B A) x + b, where W_res = W - s B0 A0 and A0, B0 are the start of A and B.

    s B0 A0 is the best rank-r approximation of W: with W = U S V^T, the paper's equations 2 to 4,

        A0 = sqrt(S_r / s) V_r^T,    B0 = U_r sqrt(S_r / s),    W_res = U_rest S_rest V_rest^T

    W_res is not stored: that would round it and lose W. Instead the layer computes

        y = W x + b + s (B A - B0 A0) x,    B A - B0 A0 = (B - B0) A + B0 (A - A0)
                                                        = [B - B0, B0] [A; A - A0]

    which is plain LoRA of rank 2r (Meng et al., equation 10, put the minus on the other factor:
    [B, B0] [A; -A0]). The factors hold the small differences themselves, so nothing cancels in half
    precision. At the start, and in `disabled`, the output is the base's, bit for bit. The cost is a
    product of rank 2r.

    The arguments are those of `LoRALinear`. W may be quantized; unlike in QPiSSA, the quantized
    base stays as it is.

    Attributes:
        start_A, start_B: buffers A0 (r, in) and B0 (out, r).
    """

    start_A: Tensor
    start_B: Tensor

    def __init__(self, base: nn.Module, *args: Any, init: str = "pissa", **settings: Any) -> None:
        super().__init__(base, *args, **settings)

    @torch.no_grad()
    def add_parameters(self) -> None:
        """Fill A and B, and keep a copy of both as A0 and B0."""
        weight = linears.dense_weight(self.base).to(self.lora_A.dtype)  # (out, in)
        approximate(weight, self.lora_A, self.lora_B, self.scale)
        self.register_buffer("start_A", self.lora_A.clone())
        self.register_buffer("start_B", self.lora_B.clone())

    def factors(self) -> tuple[Tensor, Tensor]:
        """[A; A - A0] (2r, in) and [B - B0, B0] (out, 2r)."""
        return doubled(self.lora_A, self.lora_B, self.start_A, self.start_B)


def doubled(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of B A - B0 A0: (2r, in) and (out, 2r)."""
    return torch.cat((A, A - A0)), torch.cat((B - B0, B0), dim=1)


def refuse(*_: Any) -> nn.Module:
    """Refuse `init="pissa"` for other layers: they keep all of W, so s B0 A0 would count twice."""
    what = "init 'pissa' has a layer of its own, minilora.methods.pissa.PiSSALinear"
    raise LoRAError(f"{what}: it does not go with dora or another layer")


def as_lora(adapter: Adapter, layers: dict[str, Any]) -> Adapter:
    """The adapter as plain LoRA of rank 2r for the unchanged base: this is what is saved.

    With A and B alone in the file, PEFT would have to decompose W again.
    """
    tensors, config = dict(adapter.tensors), adapter.config
    for module, layer in layers.items():
        A, B = adapter.pair(module)
        A, B = doubled(A, B, layer.start_A.to(A), layer.start_B.to(B))
        tensors[PREFIX + module + SUFFIXES["lora_A"]] = A
        tensors[PREFIX + module + SUFFIXES["lora_B"]] = B
    growth = 1 / scale(1, 2, config.rslora)  # alpha grows with the rank, so that s stays the same
    return Adapter(
        replace(
            config,
            init="kaiming",
            rank=2 * config.rank,
            alpha=growth * config.alpha,
            rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
            alpha_pattern={name: growth * alpha for name, alpha in config.alpha_pattern.items()},
        ),
        tensors,
        adapter.base_model,
        adapter.fan_in_fan_out,
    )
