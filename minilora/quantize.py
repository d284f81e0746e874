"""NF4: a weight in four bits, from which QLoRA's frozen base is made.

Dettmers et al. 2023, https://arxiv.org/abs/2305.14314. Every 64 values share one scale, their
largest absolute value. What is left lies in [-1, 1] and is rounded to the nearest of 16 fixed
values. Weights are about normal, so the 16 are quantiles of a normal: each is used about equally
often. The scales cost 32 / 64 = 0.5 bits a value; "double quantization" writes them in 8 bits,
which makes it 8 / 64 + 32 / (64 * 256) = 0.127, and 4.127 bits in all.

Codes, scales and values are those of bitsandbytes, bit for bit (`tests/test_nf4_parity.py`).
"""

import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from minilora.config import ALL_LINEAR, LoRAError, matches

BLOCK = 64
"""Values that share one absmax."""
SCALES_BLOCK = 256
"""Values of absmax that share one scale, with double quantization."""
CHUNK = 4096
"""Blocks worked on at once on a CPU: 1 MiB in float32, which stays in the cache."""

# The codebooks ------------------------------------------------------------------------------------


def normal_quantiles() -> Tensor:
    """NF4's 16 values, derived: (16,) float64, rising from -1 to 1 (section 3, equation 4).

    Sixteen equally likely values of a normal would be its quantiles at the middles of sixteen
    equal parts. No symmetric set of sixteen contains 0, though, and a weight that is 0 (padding, a
    pruned entry) should stay 0. So each side is made by itself: eight positive values from the
    quantiles of one half, seven negative ones from those of the other, and the zero between them,
    exactly. All are divided by the largest, so that a block's absmax is exact too.

    The outermost probability is the mean of 1 - 1/30 and 1 - 1/32, half a step from 1 on either
    side; the authors rounded it to 0.9677083.
    """
    outermost = 0.9677083

    def quantiles(count: int) -> Tensor:
        steps = torch.linspace(outermost, 0.5, count + 1, dtype=torch.float64)[:-1]  # not 0.5: zero
        values: Tensor = torch.special.ndtri(
            steps
        )  # the inverse of the normal's distribution function
        return values

    values = torch.cat([-quantiles(7), torch.zeros(1, dtype=torch.float64), quantiles(8)])
    values = values.sort().values
    return values.div(values.max())


# The same sixteen as published (appendix E), which were computed in single precision and so are up
# to 1.2e-7 away from `normal_quantiles`: files in the world depend on every bit of them.
CODEBOOK = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
MIDPOINTS: list[float] = ((CODEBOOK[:-1] + CODEBOOK[1:]) / 2).tolist()
# Row b: the two values that the byte b holds, the first in its high half.
PAIRS = torch.stack([CODEBOOK.repeat_interleave(16), CODEBOOK.repeat(16)], dim=1)  # (256, 2)
PAIR = torch.complex64  # two float32, moved as one number


def dynamic_codebook() -> Tensor:
    """The 8-bit code of the scales: (256,), rising (Dettmers 2015, arXiv:1511.04561).

    The signed "dynamic" type: seven decades 10^-6 .. 1, the e-th cut into 2^e equal parts of which
    each is represented by its middle; with both signs, 0 and 1.
    """
    values = [0.0, 1.0]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2**e + 1)
        middles = 10.0 ** (e - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values))


BINS = 65535
DYNAMIC = dynamic_codebook()
# The nearest code of each of 65,536 evenly spaced numbers in [-1, 1]: how bitsandbytes rounds on a
# CPU. At the borders between two codes it decides by the bin, not by the number.
NEAREST = torch.bucketize(
    torch.arange(BINS + 1).double() / BINS * 2 - 1,
    ((DYNAMIC[:-1] + DYNAMIC[1:]) / 2).double(),
).to(torch.uint8)  # fmt: skip


@functools.cache
def _table(name: str, device: torch.device) -> Tensor:
    """A codebook on a device."""
    with torch.inference_mode(False):
        return {
            "pairs": PAIRS.view(PAIR).view(-1),
            "dynamic": DYNAMIC,
            "nearest": NEAREST,
        }[name].to(device)


# A tensor in four bits ----------------------------------------------------------------------------


class NF4(NamedTuple):
    """A tensor of n values in four bits each."""

    codes: Tensor
    """(ceil(n / 2),) uint8: two codes a byte, the first in the high half."""
    absmax: Tensor
    """The scale of each block: (ceil(n / 64),) float32; uint8 with double quantization."""
    scales: Tensor | None = None
    """With double quantization, the scales of the scales: (ceil(n / 64 / 256),) float32."""
    offset: Tensor | None = None
    """With double quantization, the mean of the scales: () float32."""


@torch.no_grad()
def pack(weight: Tensor, double: bool = True) -> NF4:
    """Quantize a tensor.

    Args:
        weight: any shape, floating point; taken row by row.
        double: quantize the scales too.

    Raises:
        LoRAError: it holds an infinity or NaN.
    """
    codes, absmax = _to_nf4(weight)
    if not absmax.isfinite().all():
        raise LoRAError("cannot be quantized: it holds values that are not finite in float32")
    return _pack_scales(codes, absmax) if double else NF4(codes, absmax)


@torch.no_grad()
def unpack(
    packed: NF4,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Dequantize: the product of value and scale in float32, rounded once to `dtype`.

    Args:
        packed: n values.
        shape: of n elements.
        dtype: of the result.
        out: (ceil(n / 64) * 64,) in `dtype`, contiguous, to be written; the result is a view of it.
    """
    codes, absmax, scales, offset = packed
    if scales is not None and offset is not None:
        absmax = _unpack_scales(absmax, scales, offset)
    device, size = codes.device, torch.Size(shape).numel()
    blocks, half = absmax.numel(), BLOCK // 2
    if missing := blocks * half - codes.numel():  # the last block is ragged
        codes = F.pad(codes, (0, missing))  # copies, even where there is nothing to add
    out = (codes.new_empty(blocks * BLOCK, dtype=dtype) if out is None else out).view(-1, BLOCK)
    # float32 needs no memory besides, so that more of it fits into the cache
    step = CHUNK if dtype != torch.float32 else 4 * CHUNK
    step = min(blocks, step if device.type == "cpu" else 64 * CHUNK)
    pair = torch.int64 if torch.compiler.is_compiling() else PAIR  # it knows no complex numbers
    index = _scratch("index", step * half, torch.int64, device).view(-1, half)
    exact = None
    if dtype != torch.float32:
        exact = _scratch("exact", step * half, pair, device).view(-1, half)
    # One table, as seen by every block: rows of a `gather` are shared among the threads, where
    # `index_select` has one.
    pairs = _table("pairs", device).view(pair).expand(step, -1)  # (step, 256)
    parts = (codes.view(-1, half), absmax[:, None], out)
    for bytes_, scale, rounded in zip(*(part.split(max(step, 1)) for part in parts), strict=True):
        count = len(bytes_)
        both = rounded.view(pair) if exact is None else exact[:count]  # (count, 32)
        torch.gather(pairs[:count], 1, index[:count].copy_(bytes_), out=both)
        values = both.view(torch.float32).mul_(scale)  # (count, 64)
        if exact is not None:
            rounded.copy_(values)
    return out.view(-1)[:size].view(shape)


class _Lasting(threading.local):
    """Memory that each thread writes to again and again."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, torch.dtype], Tensor] = {}


_lasting = _Lasting()


def _scratch(name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size,), with anything in it, valid until the next call with this name and dtype.

    On a CPU the system clears every page that it gives out, which takes longer than dequantizing
    into it. So what a product needs for itself lasts, in each thread that computes: 5 MB, and as
    much as the largest weight in each dtype.
    """
    lasts = device.type == "cpu" and not torch.compiler.is_compiling()
    found = _lasting.tensors.get((name, dtype)) if lasts else None
    if found is None or found.numel() < size:
        with torch.inference_mode(False):
            found = torch.empty(size, dtype=dtype, device=device)
        if lasts and type(found) is Tensor:  # none of those that only pretend to hold something
            _lasting.tensors[name, dtype] = found
    return found[:size]


def _to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The codes, two a byte, and the scale of each block, not yet quantized."""
    size = weight.numel()
    flat = weight.reshape(-1)
    blocks, half = -(-size // BLOCK), BLOCK // 2
    codes = torch.empty(blocks * half, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, device=weight.device)
    for rows in _chunks(blocks, weight.device):
        block = flat[rows.start * BLOCK : rows.stop * BLOCK].float()
        block = F.pad(block, (0, -block.numel() % BLOCK)).view(-1, BLOCK)
        torch.amax(block.abs(), dim=1, out=absmax[rows])
        # By the reciprocal, as bitsandbytes does; below 1e-38 it would overflow.
        scaled = block * absmax[rows, None].clamp(min=1e-38).reciprocal()  # in [-1, 1]
        # The code is the number of midpoints below the value, so that ties go down.
        code = torch.zeros_like(scaled, dtype=torch.uint8)
        for midpoint in MIDPOINTS:
            code += scaled > midpoint
        code = code.view(-1, 2)
        codes[rows.start * half : rows.stop * half] = (code[:, 0] << 4) | code[:, 1]
    count = -(-size // 2)
    return codes if count == codes.numel() else codes[:count].clone(), absmax


def _pack_scales(codes: Tensor, absmax: Tensor) -> NF4:
    """Double quantization: the scales, less their mean, in 8 bits."""
    offset = _mean(absmax)
    groups = -(-absmax.numel() // SCALES_BLOCK)
    centered = F.pad(absmax - offset, (0, groups * SCALES_BLOCK - absmax.numel()))
    centered = centered.view(-1, SCALES_BLOCK)
    scales = centered.abs().amax(dim=1) if groups else centered.new_zeros(0)
    scaled = (centered * scales[:, None].reciprocal()).clamp(-1, 1)
    scaled = scaled.nan_to_num(-1)  # 0 * (1 / 0): any code will do, bitsandbytes takes the first
    bins = ((scaled + 1) * 0.5 * BINS + 0.5).int()
    bins = bins.view(-1)[: absmax.numel()]
    codes8 = _table("nearest", absmax.device).index_select(0, bins)
    return NF4(codes, codes8, scales, offset)


def _mean(absmax: Tensor) -> Tensor:
    """By one thread: the last bit of a sum depends on how many there are, and a base must not."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return absmax.mean() if absmax.numel() else absmax.new_zeros(())
    finally:
        torch.set_num_threads(threads)


def _unpack_scales(codes8: Tensor, scales: Tensor, offset: Tensor) -> Tensor:
    values = _table("dynamic", codes8.device).index_select(0, codes8.int())
    values = F.pad(values, (0, scales.numel() * SCALES_BLOCK - values.numel()))
    values = values.view(-1, SCALES_BLOCK) * scales[:, None] + offset
    return values.view(-1)[: codes8.numel()]


def _chunks(blocks: int, device: torch.device) -> list[slice]:
    step = CHUNK if device.type == "cpu" else max(blocks, 1)
    return [slice(i, min(i + step, blocks)) for i in range(0, blocks, step)]


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
            db = dy.flatten(0, -2).sum(dim=0)
        return dx, db, *[None] * (1 + len(NF4._fields))


def _weight(packed: NF4, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Dequantized for one product, and overwritten by the next."""
    size = packed.absmax.numel() * BLOCK
    return unpack(packed, shape, dtype, _scratch("weight", size, dtype, packed.codes.device))


class NF4Linear(nn.Module):
    """A frozen linear layer with its weight in four bits. Computes in the dtype of its input.

    y = x W^T + b for x (..., in) and y (..., out), where W (out, in) is what the codes mean
    (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, equations 5 and 6). W is dequantized
    for each product and thrown away: between forward and backward only the four-bit state is kept.
    `.to(dtype)` moves the bias, and leaves the state as it is.

    Args:
        linear: the layer to quantize; its bias is kept as it is. On the meta device the state is
            empty, to be loaded: `load_state_dict(..., assign=True)`.
        double: quantize the scales too.
        weight: (out, in), quantized instead of the linear's own.

    Attributes:
        codes, absmax, scales, offset: buffers, their shapes are in `NF4`.
        bias: (out,), or None.
        dtype: what the weight was in, and what `dense_weight` gives.

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
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
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

    def _apply(self, *args: Any, **kwargs: Any) -> "NF4Linear":
        floats = {n: b for n, b in self._buffers.items() if b is not None and b.is_floating_point()}
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
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

    Args:
        base: holds W (out, in); not changed.
        A: (r, in), filled here. B: (out, r), filled here; both with the square root of the
            singular values.
        scale: s, which PEFT leaves out: its start is right for s = 1 only.
        steps: alternations.

    Returns:
        The quantized base Q.

    Raises:
        LoRAError: the base is no plain linear, such as one that is quantized already, or its weight
            is not finite.
    """
    base = check_linear("init 'loftq'", base)
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
        return 8 * self.after / self.weights

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
    found = {n: m for n, m in model.named_modules() if isinstance(m, NF4Linear)}
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
        owners[id(parameter)].append(name)
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
    if not weight.is_floating_point():
        raise LoRAError(f"quantize: {name} is quantized already: its weight is {weight.dtype}")
    others = [other for other in owners.get(id(weight), []) if other != f"{name}.weight"]
    if others:
        raise LoRAError(f"quantize: {name} shares its weight with {', '.join(others)}; exclude it")
    if not weight.is_meta and not weight.isfinite().all():
        raise LoRAError(f"quantize: {name} holds values that are not finite")
    return module


def count_weights(model: nn.Module) -> int:
    """The weights in four bits: buffers, which are no parameters, yet belong to a model's size."""
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    return sum(m.in_features * m.out_features for m in layers)


@dataclass(frozen=True)
class DequantizeReport:
    """What writing the dequantized (and merged) weights in `dtype` cost."""

    modules: int
    dtype: torch.dtype
    largest: float
    """Largest |rounded - exact| of an entry."""
    relative: float
    """Largest ||rounded - exact|| / ||exact|| of a weight."""

    def __str__(self) -> str:
        return (
            f"{self.modules} linears dequantized to {self.dtype}; rounding error at most "
            f"{self.largest:.2g} an entry, {self.relative:.2g} of a weight's norm"
        )


@torch.no_grad()
def dequantize_model(
    model: nn.Module, dtype: torch.dtype = torch.float32, merge: Callable[[], None] = lambda: None
) -> DequantizeReport:
    """Replace every `NF4Linear` by a plain linear, in place; what rounding took does not come back.

    Args:
        model: a quantized model.
        dtype: of the new weights: float32, in which they are exactly what the codes mean, or bf16.
        merge: called once they are all there, in float32, and before they are rounded to `dtype`.

    Raises:
        LoRAError: another dtype, or whatever `merge` raises; the model is left as it was.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise LoRAError(f"dequantize into float32 or bfloat16, not {dtype}")
    done: list[tuple[NF4Linear, nn.Linear]] = []
    for quantized in [m for m in model.modules() if isinstance(m, NF4Linear)]:
        linear = nn.Linear(quantized.in_features, quantized.out_features, device="meta")
        weight = quantized.dense_weight(torch.float32)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.register_parameter("bias", quantized.bias)
        linear.train(quantized.training)
        replace_modules(model, {quantized: linear})
        done.append((quantized, linear))
    try:
        merge()
    except BaseException:
        for quantized, linear in done:
            replace_modules(model, {linear: quantized})
        raise
    largest = relative = 0.0
    for _, linear in done:
        exact = linear.weight
        linear.weight = nn.Parameter(exact.to(dtype), requires_grad=False)
        error = linear.weight.float() - exact
        largest = max(largest, error.abs().max().item())
        relative = max(relative, (error.norm() / exact.norm().clamp(min=1e-38)).item())
    return DequantizeReport(len(done), dtype, largest, relative)


def replace_modules(model: nn.Module, replacements: Mapping[Any, nn.Module]) -> None:
    """Put other modules in the place of some, under every name that each has."""
    for parent in list(model.modules()):  # those that come are not looked into
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
