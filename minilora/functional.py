"""The equation of the adapter's branch."""

import torch.nn.functional as F
from torch import Tensor


def low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float = 0.0) -> Tensor:
    """Add the branch: `y + s (dropout(x) A^T) B^T` (Hu et al. 2021, equation 3).

    Here y = base(x) = x W^T + b. Training usually computes the same in `fused.py`.

    Args:
        y: (..., out), the frozen layer's output.
        x: (..., in), its input.
        A: (r, in). B: (out, r). Cast to x's dtype; under autocast to autocast's.
        scale: s.
        p: probability that dropout zeroes an element of x (the others are scaled by 1 / (1 - p)).

    Returns:
        (..., out) in the wider of y's and x's dtype.
    """
    x = F.dropout(x, p, training=p > 0)  # (..., in)
    h = F.linear(x, A.to(x.dtype))  # (..., r)
    return y + F.linear(h, B.to(h.dtype)) * scale  # (..., out)
