"""The equation of the adapter's branch."""

import torch.nn.functional as F
from torch import Tensor


def low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float = 0.0) -> Tensor:
    """Y + s (dropout(x) A^T) B^T (Hu et al. 2021, equation 3), where y = base(x).

    Args:
        y: (..., out), the frozen layer's output.
        x: (..., in), its input.
        A: (r, in). B: (out, r). Cast to x's dtype; under autocast to autocast's.
        scale: s.
        p: probability that dropout takes an element of x (the others grow by 1 / (1 - p)).

    Returns:
        (..., out) in y's dtype, unless A and B are wider and x is too.
    """
    x = F.dropout(x, p, training=p > 0)  # (..., in)
    h = F.linear(x, A.to(x.dtype))  # (..., r)
    return y + F.linear(h, B.to(h.dtype)) * scale  # (..., out)
