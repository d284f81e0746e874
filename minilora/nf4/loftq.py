"""LoftQ: start A and B with what quantizing the base to NF4 rounds away.

Li et al. 2023, https://arxiv.org/abs/2310.08659.
"""

import torch
from torch import Tensor, nn

from minilora.config import LoRAError
from minilora.initialization import kaiming
from minilora.nf4.linear import NF4Linear
from minilora.nf4.model import check_linear


@torch.no_grad()
def loftq(base: nn.Module, A: Tensor, B: Tensor, scale: float) -> NF4Linear:
    """Quantize the base so that Q + s B A is near its W (Li et al. 2023, arXiv:2310.08659).

    One step of algorithm 1, as is PEFT's default: Q is NF4(W), and s B A the best rank-r
    approximation of W - Q, from its singular value decomposition. So `minilora.quantize` makes the
    adapter's base again from W. (Further steps quantize W - s B A, and come a little nearer.)

    Both factors get the square roots of the singular values, as in the paper. A is shorter then
    than a Kaiming start's, while Adam's steps are as long as before: a lower learning rate suits it
    (docs/log.md). Where nothing was lost, the row of A keeps its Kaiming start: were it zero like
    its column of B, neither would get a gradient.

    Args:
        base: holds W (out, in); not changed.
        A: (r, in), filled here. B: (out, r), filled here.
        scale: s, which PEFT leaves out: its start is right for s = 1 only.

    Returns:
        The quantized base Q.

    Raises:
        LoRAError: the base is no plain linear, such as one that is quantized already, or its weight
            is not finite.
    """
    linear = check_linear("the layer", base)
    kaiming(base, A, B, scale)
    weight = linear.weight.detach().float()  # (out, in)
    quantized = NF4Linear(linear)
    approximate(weight - quantized.dense_weight(torch.float32), A, B, scale)
    return quantized


def approximate(M: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    """Fill A (r, in) and B (out, r) so that s B A is the best rank-r approximation of M (out, in).

    Both get the square roots of the singular values. Where these are zero, A stays as it is.
    """
    if not M.is_meta and not M.isfinite().all():
        raise LoRAError("cannot start from W: it holds values that are not finite")
    rank = min(len(A), *M.shape)  # rows of A beyond it stay, and are multiplied by zeros of B
    B[:, rank:] = 0
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    # Values that count as 0, with the tolerance of torch.linalg.matrix_rank.
    zero = S[:1] * max(M.shape) * torch.finfo(S.dtype).eps >= S
    root = (S.masked_fill(zero, 0)[:rank, None] / scale).sqrt()  # (r, 1)
    A[:rank] = torch.where(root > 0, root * Vh[:rank], A[:rank])
    B[:, :rank] = U[:, :rank] * root.T  # (out, r) * (1, r)
