"""Attention for CPUs: it keeps less for the backward pass, and is faster in 16 bits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.fused import keep_mask

CHUNK = 2**20  # scores computed at a time, so that they fit into the processor's cache


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention: q (b, h, t, d) and k, v (b, h, s, d) -> (b, h, t, d).

    In float32 without dropout torch's own kernel is the fastest, and it keeps no probabilities.
    """
    simple = q.dim() == 4 and q.shape[:2] == k.shape[:2] and q.dtype == k.dtype == v.dtype
    if not simple or (q.dtype == torch.float32 and not dropout_p):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    shape = (*q.shape[:3], k.shape[2])  # (b, h, t, s)
    if is_causal:
        attn_mask = torch.ones(shape[2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            zeros = torch.zeros(attn_mask.shape, dtype=q.dtype)
            attn_mask = zeros.masked_fill_(~attn_mask, torch.finfo(q.dtype).min)
        attn_mask = attn_mask.to(q.dtype).expand(shape)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    m = keep_mask(q.new_empty(shape), dropout_p) if dropout_p else None
    out: Tensor = _Attention.apply(q, k, v, attn_mask, m, scale, dropout_p)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    """O = P' V with dropout P' = m P / (1 - p), where P = softmax(S) and S = s Q K^T + M.

    With G = dL/dO, and < > the sum over a row:

        dL/dV = P'^T G,   dL/dP = m (G V^T) / (1 - p),   dL/dS = P (dL/dP - <P dL/dP>),
        dL/dQ = s dL/dS K,   dL/dK = s (dL/dS)^T Q

    P grows with the square of the length. If it is larger than Q, K and V together, the backward
    pass computes it again.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        mask, m, scale, p = rest
        (b, h, t, d), s = q.shape, k.shape[2]
        size = max(1, CHUNK // (h * t * s))
        ctx.scale, ctx.growth = scale, 1 / (1 - p)
        ctx.parts = [slice(i, i + size) for i in range(0, b, size)]
        out, kept = q.new_empty(b, t, h, v.shape[3]), []
        with torch.autocast("cpu", enabled=False):
            for part in ctx.parts:
                P = _softmax(q, k, mask, scale, part)  # (c, h, t, s)
                if t * s <= (t + 2 * s) * d:
                    kept.append(P)
                out[part] = (_drop(P, m, part, ctx.growth) @ v[part]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, mask, m, *kept)
        return out.transpose(1, 2)  # (b, h, t, d); the memory layout is (b, t, h, d), as read next

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, m, *kept = ctx.saved_tensors
        dq, dk, dv = map(torch.empty_like, (q, k, v))
        with torch.autocast("cpu", enabled=False):
            for i, part in enumerate(ctx.parts):
                P = kept[i] if kept else _softmax(q, k, mask, ctx.scale, part)
                dv[part] = _drop(P, m, part, ctx.growth).mT @ G[part]
                dP = _drop(G[part] @ v[part].mT, m, part, ctx.growth)
                dS = torch._softmax_backward_data(dP, P, -1, P.dtype)
                dq[part] = (dS @ k[part]) * ctx.scale
                dk[part] = dS.mT @ (q[part] * ctx.scale)
        return dq, dk, dv, None, None, None, None


def _softmax(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, part: slice) -> Tensor:
    S = (q[part] * scale) @ k[part].mT  # (c, h, t, s)
    if mask is not None:
        S += mask[part]
    return S.softmax(dim=-1)  # in 16 bits torch sums in float32


def _drop(P: Tensor, m: Tensor | None, part: slice, growth: float) -> Tensor:
    return P if m is None else (P * m[part]).mul_(growth)
