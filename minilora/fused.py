"""`low_rank` with its own backward pass, which saves time and memory in training."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

CASTS = WeakTensorKeyDictionary()
"""x -> its state, and a weak reference to its cast: `_cast_once`."""
CHANGED = "\nAn adapted layer's input changed in place: write x = x + layer(x), not x += layer(x)"


def can_fuse(y: Tensor, x: Tensor) -> bool:
    """Whether `fused_low_rank` applies: y has the dtype that the branch computes in.

    It does not on the meta device, which has no autocast, where torch needs plain operations, and
    for nested and sparse tensors.
    """
    plain = x.is_meta or is_transformed() or x.is_nested or x.layout != torch.strided
    return not plain and y.dtype == compute_dtype(x)


def is_transformed() -> bool:
    """Inside `torch.func` or forward mode, where every operation is differentiated by itself."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def fused_low_rank(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float = 0.0
) -> Tensor:
    """`low_rank` with the backward of `LowRank`: the same function of the same arguments.

    Without dropout equal up to rounding; with dropout it draws other masks from the same seed.
    """
    # also without gradients: a reentrant checkpoint's first pass must draw what its second draws
    cast = None if x.dtype == y.dtype else _cast_once(x, y.dtype)
    result: Tensor = LowRank.apply(y, x, cast, A, B, scale, p)  # type: ignore[no-untyped-call]
    return result


class LowRank(torch.autograd.Function):
    """z = y + s (x' A^T) B^T for the dropped-out x' = m x / (1 - p), where m is 0 or 1.

    Let rows be tokens, n of them: y and z are (n, out), x and m (n, in), h = x' A^T is (n, r), and
    G = dL/dz is (n, out). A change of each factor changes the loss, to first order, by

        dL = <G, dz> = <G, dy> + s <G, dh B^T> + s <G, h dB^T>,    dh = dx' A^T + x' dA^T,

    and <P, Q R> = <P R^T, Q> = <Q^T P, R> moves everything but the change to the left:

        dL/dy  = G                                      (n, out)
        dL/dB  = s G^T h                                (out, r)
        dL/dh  = s G B                                  (n, r)
        dL/dA  = (dL/dh)^T x'                           (r, in)
        dL/dx' = (dL/dh) A,  dL/dx = m dL/dx' / (1 - p) (n, in)

    In addition to A and B it saves x once, the narrow h, and m in one byte per element. It saves no
    dropped-out copy of x: m x is computed again. Both scales, t = s / (1 - p), are multiplied into
    the small B, once, before it is rounded to the dtype of the product; `addmm` then multiplies and
    adds in one operation. Only gradients that are needed are computed.

    The base is outside: y is an input, and its gradient is passed on unchanged. dL/dx goes to x, in
    x's own dtype. `cast`, x in the dtype of the products, is an argument and not computed here, so
    that a second derivative can go through it.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, cast: Tensor | None, *rest: Any) -> Tensor:
        A, B, scale, p = rest
        with torch.autocast(x.device.type, enabled=False):
            ctx.t, ctx.dtypes = scale / (1 - p), (x.dtype, A.dtype, B.dtype)
            m = keep_mask(x, p) if p else None
            x = x if cast is None else cast
            h, a, tb = _factors(x, m, A, B, ctx.t)
            ctx.save_for_backward(x, m, h, a, tb, A, B)
            z = torch.addmm(_rows(y), h, tb.T)  # (n, out)
            # as F.linear ends: autograd refuses to change a `view` made here in place
            result: Tensor = torch.ops.aten._unsafe_view(z, y.shape)
            return result

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        try:
            x, m, h, a, tb, A, B = ctx.saved_tensors
        except RuntimeError as error:  # with dropout the plain line keeps a copy of its own
            raise RuntimeError(str(error) + CHANGED * ("inplace" in str(error))) from None
        dx = dA = dB = None
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():  # a second derivative will be taken: of x, A and B
                h, a, tb = _factors(x, m, A, B, ctx.t)
            g = _rows(G)  # (n, out)
            dh = g @ tb  # (n, r), with 1 / (1 - p)
            if ctx.needs_input_grad[1]:
                dx = (dh @ a).view(x.shape)  # (..., in)
                dx = (dx if m is None else dx * m).to(ctx.dtypes[0])
            if ctx.needs_input_grad[3]:
                dA = (dh.T @ _rows(x if m is None else x * m)).to(ctx.dtypes[1])  # (r, in)
            if ctx.needs_input_grad[4]:
                dB = (h.T @ g).T.to(ctx.dtypes[2]) * ctx.t  # (out, r); faster this way round
        return G, dx, None, dA, dB, None, None


def _factors(x: Tensor, m: Tensor | None, A: Tensor, B: Tensor, t: float) -> tuple[Tensor, ...]:
    """H (n, r), without 1 / (1 - p), A (r, in) and t B (out, r), all in x's dtype."""
    a = A.to(x.dtype)
    return _rows(x if m is None else x * m) @ a.T, a, (B * t).to(x.dtype)


def keep_mask(x: Tensor, p: float) -> Tensor:
    """Which elements of x dropout keeps: uint8, 1 with probability 1 - p, in x's shape.

    On a CPU `bernoulli_` costs more than the layer's product. There 16 random bits decide, four
    elements share a draw of the generator, and p is met to 1 / 65,536.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or p * 65536 > 65535:
        return torch.empty_like(x, dtype=torch.uint8).bernoulli_(1 - p)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device="cpu").random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)  # each of 65,536 values alike
    mask = torch.empty(x.shape, dtype=torch.uint8, device="cpu")
    return torch.ge(bits, round(p * 65536) - 32768, out=mask)  # into bytes: 20x as fast as to bool


def _rows(x: Tensor) -> Tensor:
    """(..., d) -> (n, d)."""
    return x.reshape(-1, x.shape[-1])


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which F.linear would compute: autocast's, except for float64, or x's."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _cast_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast x, once for all layers that read it: q and v of an attention save the same cast.

    It is cached while a backward pass needs it, and x is what it was; autograd cannot see, nor can
    this, what changes the values by `x.data`. Without the cache
    `test_q_and_v_save_at_most_two_fifths_of_what_peft_saves` fails.
    """
    if torch.compiler.is_compiling() or x.is_inference():
        return x.to(dtype)  # a compiler finds the common cast by itself
    asked = x.requires_grad and torch.is_grad_enabled()
    state = x._version, x.data_ptr(), dtype, asked
    known, reference = CASTS.get(x, (None, lambda: None))
    cast: Tensor | None = reference() if known == state else None
    if cast is None:
        cast = x.to(dtype)
        CASTS[x] = state, TensorWeakRef(cast)
    return cast
