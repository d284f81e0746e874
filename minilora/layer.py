"""LoRALinear: a frozen linear layer and its low-rank update."""

from typing import Any

import torch
from torch import Tensor, nn

from minilora import linears
from minilora.config import Init, LoRAError, check
from minilora.functional import low_rank, scale
from minilora.fused import can_fuse, fused_low_rank
from minilora.initialization import STARTS


class LoRALinear(nn.Module):
    """y = base(x) + s B A x: a frozen linear layer W (out, in) with a trainable update s B A.

    Hu et al. 2021 (https://arxiv.org/abs/2106.09685), equation 3; x is (..., in), y (..., out).

    Args:
        base: the layer to adapt; `torch.nn.Linear`, Conv1D, or a `linears.LinearLike`. Its
            parameters are frozen here.
        rank: r, at least 1. Above the smaller side of W it adds parameters but no freedom; `inject`
            refuses it.
        alpha: numerator of the scale s = alpha / r.
        dropout: dropout probability, in [0, 1), on the elements of x that A reads; training only.
        rslora: s = alpha / sqrt(r).
        init: how A and B are initialized; see `LoRAConfig`.

    Attributes:
        base: the wrapped layer.
        lora_A: parameter (r, in). lora_B: parameter (out, r). Float32 (float64 on a float64 base).
        scale: s.
        fused: whether training uses the hand-written backward pass; True by default.
        enabled: False computes the base alone.

    Raises:
        LoRAError: the base cannot be adapted, or a number is out of range.

    Example:
        >>> layer = LoRALinear(nn.Linear(16, 4), rank=2, alpha=8)
        >>> layer(torch.ones(3, 16)).shape, layer.scale
        (torch.Size([3, 4]), 4.0)
        >>> layer.lora_A.shape, layer.lora_B.shape, layer.delta().shape
        (torch.Size([2, 16]), torch.Size([4, 2]), torch.Size([4, 16]))
        >>> before = layer.base.weight.clone()
        >>> layer.merge()
        >>> layer.unmerge()
        >>> torch.equal(layer.base.weight, before)
        True
    """

    fused: bool = True
    """True: training uses `fused_low_rank`, with a hand-written backward that takes less time and
    memory (`can_fuse` says where it can). False, on a layer or on the class for all layers:
    training uses `low_rank`, as evaluation always does. `low_rank` equals PEFT bit for bit in
    float32 and under bfloat16 autocast. On a half-precision base without autocast it does not:
    PEFT computes the branch in float32, `low_rank` in the base's dtype. In float32 the hand-written
    backward keeps x itself, so autograd refuses `x += layer(x)`. With dropout, False allows it,
    because dropout makes a copy."""

    # The base's own values while it is merged, else None. Buffers, so that `.to()` moves them.
    original_weight: Tensor | None  # (out, in)
    original_bias: Tensor | None  # (out,); only where merging changes the bias too

    def __init__(
        self, base: nn.Module, rank: int = 8, alpha: float = 32.0, dropout: float = 0.0, *,
        rslora: bool = False, init: Init = "kaiming",
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("rank", rank), ("alpha", alpha), ("dropout", dropout), ("init", init)):
            check(name, value)
        device, dtype = linears.adapter_placement(base)
        self.out_features, self.in_features = out, in_ = linears.shape(base)
        self.lora_A = nn.Parameter(torch.empty(rank, in_, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(out, rank, device=device, dtype=dtype))
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.scale = scale(alpha, rank, rslora)
        self.base = STARTS[init](base, self.lora_A.data, self.lora_B.data, self.scale)
        self.base.requires_grad_(False)
        self.enabled = True  # False inside `with minilora.disabled(model)`
        self.register_buffer("original_weight", None, persistent=False)
        self.register_buffer("original_bias", None, persistent=False)
        self.register_state_dict_post_hook(_write_originals)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(refuse_merged)  # type: ignore[no-untyped-call]
        self.add_parameters()
        self.train(base.training)

    def add_parameters(self) -> None:
        """A hook for subclasses, called last in `__init__`: what trains besides A and B."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out).

        Raises:
            LoRAError: called to train while merged: A and B would get no gradient.
        """
        if self.merged and self.training and torch.is_grad_enabled():
            raise LoRAError("cannot train while merged: call minilora.unmerge(model) first")
        y: Tensor = self.base(x)  # (..., out)
        if self.merged or not self.enabled:
            return y
        p = self.dropout if self.training else 0.0
        branch = fused_low_rank if self.training and self.fused and can_fuse(y, x) else low_rank
        return branch(y, x, *self.factors(), self.scale, p)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of the equation; other methods compute them otherwise."""
        return self.lora_A, self.lora_B

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Delta W = s B A: (out, in), float32 or wider, on the layer's device."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        # The meta device has no autocast.
        with torch.autocast(self.lora_A.device.type.replace("meta", "cpu"), enabled=False):
            A, B = self.factors()
            return (B.to(wide) @ A.to(wide)) * self.scale  # (out, r) (r, in) -> (out, in)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + s B A for the original W: (out, in), float32 or wider."""
        return weight + self.delta()  # in the wider dtype of the two

    def merged_bias(self) -> Tensor | None:
        """The bias after merging: (out,), float32 or wider; None leaves it as it is."""
        return None

    @property
    def merged(self) -> bool:
        """Whether the base's weight currently holds W + s B A."""
        return self.original_weight is not None

    @torch.no_grad()
    def merge(self) -> None:
        """W <- W + s B A, in the same storage: summed in float32 or wider, rounded once.

        Merging a merged layer changes nothing.

        Raises:
            LoRAError: the base is quantized, the sum does not fit the weight's dtype, or the layer
                is disabled or on the meta device.
        """
        if self.merged:
            return
        if self.lora_A.is_meta or not self.enabled:
            raise LoRAError("cannot merge on the meta device, or inside minilora.disabled")
        if not linears.is_mergeable(self.base):
            what = f"cannot merge into a {type(self.base).__name__}: a quantized weight would lose"
            raise LoRAError(f"{what} the update; minilora.unwrap(model, dequantize=True) merges")
        weight, bias = linears.dense_weight(self.base), self.bias  # (out, in), a view; (out,)
        new_weight, new_bias = self.merged_weight(weight).to(weight.dtype), self.merged_bias()
        if weight.isfinite().all() and not new_weight.isfinite().all():
            raise LoRAError(f"W + s B A does not fit {weight.dtype}: merge in a wider dtype")
        self.original_weight = weight.clone()
        weight.copy_(new_weight)
        if bias is not None and new_bias is not None:
            self.original_bias = bias.detach().clone()
            bias.copy_(new_bias)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the original weights, bit for bit. An unmerged layer is left as it is."""
        if self.original_weight is not None:
            linears.dense_weight(self.base).copy_(self.original_weight)
        if self.original_bias is not None and self.bias is not None:
            self.bias.copy_(self.original_bias)
        self.original_weight = self.original_bias = None

    # Some models look at their linears: T5 casts to `wo.weight.dtype`.
    @property
    def weight(self) -> Tensor:
        """The base's weight as it is now: W, or W + s B A while merged."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return getattr(self.base, "bias", None)

    def extra_repr(self) -> str:
        """What `print(model)` shows between the parentheses."""
        state = ", merged" if self.merged else ""
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}{state}"


def _write_originals(layer: LoRALinear, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A checkpoint holds W, A and B. Without this hook a merged model would save W + s B A as W.

    The test is `test_a_state_dict_holds_the_original_weight_whether_merged_or_not`.
    """
    if (weight := layer.original_weight) is not None:
        state[f"{prefix}base.weight"] = weight.T if linears.is_conv1d(layer.base) else weight
    if layer.original_bias is not None:
        state[f"{prefix}base.bias"] = layer.original_bias


def refuse_merged(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse to load a weight that the next `unmerge` would overwrite, before any is written.

    A hook of every layer (without it `test_loading_while_merged_is_refused_and_nothing_changed`
    fails) and of every injected model (without it
    `test_loading_into_a_merged_model_is_refused_and_no_weight_is_changed` fails, since a layer's
    hook runs after the modules before it have been loaded).
    """
    merged = [n for n, m in module.named_modules() if isinstance(m, LoRALinear) and m.merged]
    starts = tuple(f"{prefix}{name}." if name else prefix for name in merged)
    if any(key.startswith(starts) for key in state):
        raise LoRAError("cannot load weights while merged: call minilora.unmerge(model) first")
