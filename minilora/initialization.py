"""How A and B start."""

import math

import torch
from torch import Tensor, nn

from minilora.config import Init, LoRAError
from minilora.quantize import NF4Linear


def initialize(A: Tensor, B: Tensor, init: Init) -> None:
    """Fill A (r, in) and B (out, r) in place.

    With B = 0 the adapted layer starts as the base itself, and since dL/dB = s (dL/dy)^T (x A^T)
    is not zero, it does not stay there. Were A zero too, both gradients would be, for ever.

    - "kaiming": A uniform in +-1/sqrt(in) (what Kaiming with a = sqrt(5) comes to, as in loralib
      and PEFT), B zero.
    - "gaussian": A normal with standard deviation 1/r (as in PEFT), B zero.
    - "random": both uniform, so that the output changes at once; for tests.
    - "loftq": zero here; `loftq` fills them, since it needs the weight.
    """
    rank = A.shape[0]
    if init == "gaussian":
        nn.init.normal_(A, std=1 / rank)
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if init == "random":
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    else:
        nn.init.zeros_(B)


@torch.no_grad()
def loftq(base: nn.Module, A: Tensor, B: Tensor, scale: float, steps: int = 1) -> NF4Linear:
    """Quantize the base so that Q + s B A is near its W (Li et al. 2023, arXiv:2310.08659).

    Algorithm 1 alternates: Q <- NF4(W - s B A), then s B A <- the best rank-r approximation of
    W - Q, from its singular value decomposition. After one step, PEFT's default and ours, Q is
    NF4(W) itself: whoever has W can make the very base again that the adapter belongs to. Further
    steps come a little nearer to W, but their Q is known to nobody who has not repeated them.

    Args:
        base: holds W (out, in); not changed.
        A: (r, in), filled here. B: (out, r), filled here; both with the square root of the
            singular values.
        scale: s, which PEFT leaves out: its start is right for s = 1 only.
        steps: alternations.

    Returns:
        The quantized base Q.

    Raises:
        LoRAError: the base does not hold a plain weight, or one that is not finite.
    """
    if not isinstance(base, nn.Linear):
        raise LoRAError("init 'loftq' quantizes the base itself: leave it out of minilora.quantize")
    weight = base.weight.detach().float()  # (out, in)
    update = torch.zeros_like(weight)
    for _ in range(steps):
        quantized = NF4Linear(base, weight=weight - update)
        residual = weight - quantized.dense_weight(torch.float32)
        U, S, Vh = torch.linalg.svd(residual, full_matrices=False)
        root = (S[: len(A)] / scale).sqrt()  # (r,)
        A.copy_(root[:, None] * Vh[: len(A)])
        B.copy_(U[:, : len(A)] * root)
        update = scale * B @ A
    return quantized
