"""The LoRA equation. The other files apply it to layers and models.

A linear layer computes y = x W^T + b. LoRA freezes W (out, in) and adds the product of two narrow
matrices A (r, in) and B (out, r), which train:

    y = x W^T + b + s (x A^T) B^T        that is, W becomes W + s B A
"""

import math

import torch.nn.functional as F
from torch import Tensor


def scale(alpha: float, rank: int, rslora: bool = False) -> float:
    """The scale s = alpha / r (Hu et al. 2021, section 4.1), or alpha / sqrt(r) (rsLoRA)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, p: float = 0.0) -> Tensor:
    """Add the adapter's branch: `y + s (dropout(x) A^T) B^T` (Hu et al. 2021, equation 3).

    Training usually computes the same in `fused.py`.

    Args:
        y: (..., out), the frozen layer's output x W^T + b.
        x: (..., in), its input.
        A: (r, in). B: (out, r). Cast to x's dtype; under autocast to autocast's.
        s: the scale.
        p: probability that dropout zeroes an element of x (the others are scaled by 1 / (1 - p)).

    Returns:
        (..., out). The branch has x's dtype, or autocast's. The result has the wider dtype of y and
        the branch.
    """
    x = F.dropout(x, p, training=p > 0)  # (..., in)
    h = F.linear(x, A.to(x.dtype))  # (..., r)
    return y + F.linear(h, B.to(h.dtype)) * s  # (..., out)
