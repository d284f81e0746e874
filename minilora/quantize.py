"""A model in four bits: QLoRA's frozen linears, LoftQ's start, the way there and back.

Dettmers et al. 2023, https://arxiv.org/abs/2305.14314; Li et al. 2023, https://arxiv.org/abs/2310.08659.
What four bits are, and how a tensor is put into them, is `nf4.py`.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from minilora.config import ALL_LINEAR, LoRAError, matches
from minilora.nf4 import BLOCK, NF4, SCALES_BLOCK, pack, scratch, unpack

# The layer ----------------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    """y = x W^T + b and dL/dx = dL/dy W with W dequantized for each: none is kept between."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, int], *packed: Tensor | None
    ) -> Tensor:
        ctx.shape = shape
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*packed)
        return F.linear(x, _weight(NF4(*packed), shape, x.dtype), bias)  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = db = None
        if ctx.needs_input_grad[0]:
            weight = _weight(NF4(*ctx.saved_tensors), ctx.shape, dy.dtype)  # (out, in)
            dx = dy @ weight  # (..., out) (out, in) -> (..., in)
        if ctx.needs_input_grad[1]:
            db = dy.reshape(-1, dy.shape[-1]).sum(dim=0)
        return dx, db, *[None] * (1 + len(NF4._fields))


def _weight(packed: NF4, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Dequantized for one product, and overwritten by the next."""
    size = packed.absmax.numel() * BLOCK
    return unpack(packed, shape, dtype, scratch("weight", size, dtype, packed.codes.device))


class NF4Linear(nn.Module):
    """A frozen linear layer with its weight in four bits. Computes in the dtype of its input.

    y = x W^T + b for x (..., in) and y (..., out), where W (out, in) is what the codes mean
    (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, equations 5 and 6). W is dequantized
    for each product and thrown away: between forward and backward only the four-bit state is kept.
    `.to(dtype)` casts the bias and what `dense_weight` gives, and leaves the state as it is.

    Args:
        linear: the layer to quantize; its bias is kept as it is. On the meta device the state is
            empty, to be loaded: `load_state_dict(..., assign=True)`.
        double: quantize the scales too.
        weight: (out, in), quantized instead of the linear's own.

    Attributes:
        codes, absmax, scales, offset: buffers, their shapes are in `NF4`.
        bias: (out,), or None.
        dtype: what the weight would be in, and what `dense_weight` gives.

    Raises:
        LoRAError: the weight holds an infinity or NaN.

    Example:
        >>> layer = NF4Linear(nn.Linear(64, 16))
        >>> layer(torch.ones(3, 64)).shape, layer.dense_weight().shape
        (torch.Size([3, 16]), torch.Size([16, 64]))
    """

    codes: Tensor
    absmax: Tensor
    scales: Tensor | None
    offset: Tensor | None
    bias: nn.Parameter | None

    mergeable = False  # rounding to sixteen values would swallow most of an update

    def __init__(
        self, linear: nn.Linear, double: bool = True, weight: Tensor | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        weight = linear.weight.detach() if weight is None else weight
        packed = _empty(weight, double) if weight.is_meta else pack(weight, double)
        for name, tensor in packed._asdict().items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", linear.bias)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        wide = x.dtype == torch.float64  # which autocast leaves alone
        if not (x.is_meta or wide) and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        shape = (self.out_features, self.in_features)
        y: Tensor = _Product.apply(x, bias, shape, *self.packed)  # type: ignore[no-untyped-call]
        return y

    @property
    def packed(self) -> NF4:
        """The state, as `unpack` takes it."""
        return NF4(self.codes, self.absmax, self.scales, self.offset)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight dequantized, as a copy: (out, in)."""
        return unpack(self.packed, (self.out_features, self.in_features), dtype or self.dtype)

    @property
    def weight(self) -> Tensor:
        """For models that look at their linears: shape and dtype (out, in), without the values."""
        size = (self.out_features, self.in_features)
        return torch.empty(size, dtype=self.dtype, device="meta")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "NF4Linear":
        floats = {n: b for n, b in self._buffers.items() if b is not None and b.is_floating_point()}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        for name, before in floats.items():  # rounding a scale would move 64 weights
            now = self._buffers[name]
            assert now is not None
            if now.dtype != before.dtype:
                self._buffers[name] = before.to(now.device)
        return self

    def extra_repr(self) -> str:
        double = self.scales is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, double={double}"
        )


def _empty(weight: Tensor, double: bool) -> NF4:
    """State of the right shapes, where there are no values to quantize."""
    blocks = -(-weight.numel() // BLOCK)
    codes = weight.new_empty(-(-weight.numel() // 2), dtype=torch.uint8)
    if not double:
        return NF4(codes, weight.new_empty(blocks, dtype=torch.float32))
    scales = weight.new_empty(-(-blocks // SCALES_BLOCK), dtype=torch.float32)
    absmax = weight.new_empty(blocks, dtype=torch.uint8)
    return NF4(codes, absmax, scales, weight.new_empty((), dtype=torch.float32))


# LoftQ -------------------------------------------------------------------------------------------


@torch.no_grad()
def loftq(base: nn.Module, A: Tensor, B: Tensor, scale: float, steps: int = 1) -> NF4Linear:
    """Quantize the base so that Q + s B A is near its W (Li et al. 2023, arXiv:2310.08659).

    Algorithm 1 alternates: Q <- NF4(W - s B A), then s B A <- the best rank-r approximation of
    W - Q, from its singular value decomposition. After one step, PEFT's default and ours, Q is
    NF4(W) itself: whoever has W can make the very base again that the adapter belongs to. Further
    steps come a little nearer to W, but their Q is known to nobody who has not repeated them.

    Both factors get the square roots of the singular values, as in the paper. A is shorter then
    than a Kaiming start's, while Adam's steps are as long as ever: a lower learning rate suits it
    (docs/log.md). Where nothing was lost the row of A stays what it was: were it zero like its
    column of B, neither would get a gradient.

    Args:
        base: holds W (out, in); not changed.
        A: (r, in), as "kaiming" starts it, filled here. B: (out, r), filled here.
        scale: s, which PEFT leaves out: its start is right for s = 1 only.
        steps: alternations.

    Returns:
        The quantized base Q.

    Raises:
        LoRAError: the base is no plain linear, such as one that is quantized already, or its weight
            is not finite.
    """
    base = check_linear("the base of init='loftq'", base)
    weight = base.weight.detach().float()  # (out, in)
    update = torch.zeros_like(weight)
    rank = min(len(A), *weight.shape)  # what is beyond it stays as it is, and counts for nothing
    B[:, rank:] = 0
    for _ in range(steps):
        quantized = NF4Linear(base, weight=weight - update)
        residual = weight - quantized.dense_weight(torch.float32)
        U, S, Vh = torch.linalg.svd(residual, full_matrices=False)
        # What the decomposition gives for 0, as `matrix_rank` has it.
        zero = S[:1] * max(weight.shape) * torch.finfo(S.dtype).eps >= S
        root = (S.masked_fill(zero, 0)[:rank, None] / scale).sqrt()  # (r, 1)
        A[:rank] = torch.where(root > 0, root * Vh[:rank], A[:rank])
        B[:, :rank] = U[:, :rank] * root.T  # (out, r) * (1, r)
        update = scale * B @ A
    return quantized


# A model ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize` did.

    Attributes:
        modules: dotted names of the linears in four bits.
        weights: how many weights they hold.
        before: their size in bytes, biases not counted.
        after: the same in four bits, scales included.

    Example:
        >>> round(quantize(nn.Sequential(nn.Linear(1024, 1024))).bits, 3)
        4.127
    """

    modules: tuple[str, ...]
    weights: int
    before: int
    after: int

    @property
    def bits(self) -> float:
        """Bits a weight, scales included."""
        return 8 * self.after / max(self.weights, 1)

    def __str__(self) -> str:
        return (
            f"{len(self.modules)} linears in 4 bits: {self.before / 1e6:,.1f} MB -> "
            f"{self.after / 1e6:,.1f} MB ({self.bits:.3f} bits a weight)"
        )


def quantize(
    model: nn.Module,
    targets: str | tuple[str, ...] = ALL_LINEAR,
    exclude: str | tuple[str, ...] = ("lm_head",),
    double: bool = True,
) -> QuantizeReport:
    """Replace linears by `NF4Linear`, in place; `minilora.inject` afterwards makes it QLoRA.

    Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3. Of each W (out, in) half a
    byte a value is kept, and a scale for every 64 values along its rows. Everything else,
    embeddings and norms, stays as it is. A quantized model is saved by
    `safetensors.torch.save_model`, and loaded into a model that was quantized alike.

    Args:
        model: not yet injected.
        targets: which linears, as in `LoRAConfig`: names, a regular expression, or "all-linear"
            (all but the output head).
        exclude: linears to leave alone, such as those that LoftQ is to quantize.
        double: quantize the scales too: 4.127 bits a weight instead of 4.5.

    Returns:
        The modules and their sizes before and after.

    Raises:
        LoRAError: nothing to quantize, or a linear that cannot be: it is named, and the model is
            untouched.

    Example:
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(128, 128)})
        >>> print(quantize(model))
        1 linears in 4 bits: 0.1 MB -> 0.0 MB (4.129 bits a weight)
        >>> model["q_proj"].codes.shape  # two a byte
        torch.Size([8192])
    """
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise LoRAError("the model carries an adapter already: quantize it before inject")
    found = select_linears(model, targets, exclude)
    for name in list(found):
        linear = found.pop(name)  # so that its weight is let go at once
        replace_modules(model, {linear: NF4Linear(linear, double)})
    return quantize_report(model)


def quantize_report(model: nn.Module) -> QuantizeReport:
    """Which linears of a model are in four bits, and what that saves."""
    named = model.named_modules()
    found = {n.replace("_orig_mod.", ""): m for n, m in named if isinstance(m, NF4Linear)}
    after = sum(t.nbytes for m in found.values() for t in m.packed if t is not None)
    before = sum(m.weight.nbytes for m in found.values())
    return QuantizeReport(tuple(found), count_weights(model), before, after)


def select_linears(
    model: nn.Module,
    targets: str | tuple[str, ...] = ALL_LINEAR,
    exclude: str | tuple[str, ...] = ("lm_head",),
) -> dict[str, nn.Linear]:
    """The linears that `quantize` would replace, by dotted name, all checked."""
    named = [(n.replace("_orig_mod.", ""), m) for n, m in model.named_modules() if n]
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name.replace("_orig_mod.", ""))
    found = {}
    for name, module in named:
        if exclude and matches(exclude, name):
            continue
        if targets == ALL_LINEAR:
            wanted = isinstance(module, nn.Linear) and module is not head
            wanted = wanted and not isinstance(module, NonDynamicallyQuantizableLinear)
        else:
            wanted = matches(targets, name)
        if wanted:
            found[name] = check_linear(name, module, owners)
    for entry in (targets,) if isinstance(targets, str) else targets:
        as_given = entry if isinstance(targets, str) else (entry,)
        if entry != ALL_LINEAR and not any(matches(as_given, name) for name, _ in named):
            raise LoRAError(f"quantize: targets: {entry!r}: nothing matches it in the model")
    if not found:
        raise LoRAError("quantize: the model has no torch.nn.Linear that is targeted")
    return found


def check_linear(name: str, module: nn.Module, owners: Mapping[int, list[str]] = {}) -> nn.Linear:
    """The module, if it can be quantized."""
    kind = type(module).__name__
    if isinstance(module, NonDynamicallyQuantizableLinear) or not isinstance(module, nn.Linear):
        raise LoRAError(f"quantize: {name} is a {kind}: only plain linears can be; exclude it")
    weight = module._parameters.get("weight")
    if weight is None:
        raise LoRAError(f"quantize: {name}: its weight is computed anew at every call; exclude it")
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise LoRAError(f"quantize: {name} is quantized already: its weight is {weight.dtype}")
    others = [other for other in owners.get(id(weight), []) if other != f"{name}.weight"]
    if others:
        raise LoRAError(f"quantize: {name} shares its weight with {', '.join(others)}; exclude it")
    if not weight.is_meta and not weight.float().isfinite().all():
        raise LoRAError(f"quantize: {name} holds values that are not finite in float32")
    return module


def count_weights(model: nn.Module) -> int:
    """The weights in four bits: buffers, which are no parameters, yet belong to a model's size."""
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    return sum(m.in_features * m.out_features for m in layers)


@dataclass(frozen=True)
class DequantizeReport:
    """What writing the dequantized (and merged) weights in `dtypes` cost."""

    modules: int
    dtypes: tuple[torch.dtype, ...]
    largest: float
    """Largest |rounded - exact| of an entry."""
    relative: float
    """Largest ||rounded - exact|| / ||exact|| of a weight."""

    def __str__(self) -> str:
        if not self.modules:
            return "no linears in 4 bits"
        return (
            f"{self.modules} linears dequantized to {', '.join(map(str, self.dtypes))}; rounding "
            f"error at most {self.largest:.2g} an entry, {self.relative:.2g} of a weight's norm"
        )


@torch.no_grad()
def dequantize_model(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    merge: Callable[[], None] = lambda: None,
    unmerge: Callable[[], None] = lambda: None,
) -> DequantizeReport:
    """Replace every `NF4Linear` by a plain linear, in place; what rounding took does not come back.

    Args:
        model: a quantized model.
        dtype: float32, in which the weights are exactly what the codes mean, or bf16; the whole
            model is cast to it. None: each weight gets the dtype of its layer, the model's own.
        merge: called once the weights are there, in float32, and before they are rounded.
        unmerge: takes back what `merge` did.

    Raises:
        LoRAError: another dtype, a weight that does not fit it, or whatever `merge` raises; the
            model is left as it was.
    """
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise LoRAError(f"dequantize into float32 or bfloat16, not {dtype}")
    done: list[tuple[NF4Linear, nn.Linear]] = []
    try:
        for quantized in [m for m in model.modules() if isinstance(m, NF4Linear)]:
            linear = nn.Linear(quantized.in_features, quantized.out_features, device="meta")
            weight = quantized.dense_weight(torch.float32)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.register_parameter("bias", quantized.bias)
            linear.train(quantized.training)
            done.append((quantized, linear))
            replace_modules(model, {quantized: linear})
        merge()
        for quantized, linear in done:
            final = dtype or quantized.dtype
            if not linear.weight.to(final).isfinite().all():
                raise LoRAError(f"a dequantized weight does not fit {final}: say dtype")
    except BaseException:
        unmerge()
        for quantized, linear in done:
            replace_modules(model, {linear: quantized})
        raise
    largest = relative = 0.0
    for quantized, linear in done:
        exact = linear.weight
        linear.weight = nn.Parameter(exact.to(dtype or quantized.dtype), requires_grad=False)
        if exact.numel() == 0:
            continue
        error = linear.weight.float() - exact
        largest = max(largest, error.abs().max().item())
        relative = max(relative, (error.norm() / exact.norm().clamp(min=1e-38)).item())
    if dtype is not None:
        nn.Module.to(model, dtype)  # a model in two dtypes would not run
    dtypes = dict.fromkeys(dtype or quantized.dtype for quantized, _ in done)
    return DequantizeReport(len(done), tuple(dtypes), largest, relative)


def replace_modules(model: nn.Module, replacements: Mapping[Any, nn.Module]) -> None:
    """Put other modules in the place of some, under every name that each has."""
    for parent in list(model.modules()):  # those that come are not looked into
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
