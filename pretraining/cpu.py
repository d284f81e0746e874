"""A step in bf16 on a CPU: attention and cross-entropy that keep less, so that memory is reused.

`docs/log.md` (2026-11-29) has what each is worth on a processor with AMX.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minilora.summarization.model.attention import attention

ROWS = 512  # of logits at a time


def attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **told: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: q (b, h, t, d), k, v (b, h, s, d) -> (b, t, h, d)."""
    out = attention(q, k, v, mask, told.get("dropout", 0.0), scale=told["scaling"])
    return out.transpose(1, 2).contiguous(), None


def use_fast_attention(model: PreTrainedModel) -> None:
    """In bf16 torch's own kernel takes more than a third of a step, minilora's a fifth."""
    ALL_ATTENTION_FUNCTIONS.register("pocket", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("pocket", eager_mask)
    model.set_attn_implementation("pocket")


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of h W^T, h (n, d), W (v, d), labels (n), a few rows at a time.

    With P = softmax(h W^T) and Y the labels as one-hot rows, dL/dh = (P - Y) W / n and
    dL/dW = (P - Y)^T h / n. Both are computed with the loss, while the rows are in the cache.
    Products are in the type of h, sums in float32 or wider.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor, labels: Tensor) -> Tensor:
        n, wide = len(h), torch.promote_types(h.dtype, torch.float32)
        dh, dW = torch.empty_like(h), torch.zeros_like(W, dtype=wide)
        total = torch.zeros((), dtype=wide)
        for start in range(0, n, ROWS):
            rows = slice(start, start + ROWS)
            label = labels[rows, None]
            z = (h[rows] @ W.t()).to(wide)  # (rows, v)
            norm = z.logsumexp(1, keepdim=True)
            total += (norm - z.gather(1, label)).sum()
            G = z.sub_(norm).exp_()  # P
            G.scatter_add_(1, label, -torch.ones_like(label, dtype=wide))
            G = G.div_(n).to(h.dtype)
            dh[rows] = G @ W
            dW += G.t() @ h[rows]
        ctx.save_for_backward(dh, dW.to(W.dtype))
        return total / n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        dh, dW = ctx.saved_tensors
        return dh * u.to(dh.dtype), dW * u.to(dW.dtype), None
