"""NF4: a tensor in four bits, the format of QLoRA's frozen base.

Dettmers et al. 2023, https://arxiv.org/abs/2305.14314. Every 64 values share one scale, their
largest absolute value. A value divided by its scale lies in [-1, 1] and is rounded to the nearest
of 16 fixed values. Weights are approximately normal, so the 16 are quantiles of a normal. The
scales cost 32 / 64 = 0.5 bits a value. "Double quantization" stores them in 8 bits, which costs
8 / 64 + 32 / (64 * 256) = 0.127 bits a value: 4.127 bits in all.

Codes, scales and values are those of bitsandbytes, bit for bit (`tests/test_nf4_parity.py`).
"""

import threading
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.config import LoRAError
from minilora.fused import is_transformed

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
    pruned entry) should stay 0. So each side is computed by itself: eight positive values from the
    quantiles of one half, seven negative ones from those of the other, and an exact 0 between them.
    All are divided by the largest, so that a block's absmax is exact too.

    The outermost probability is the mean of 1 - 1/30 and 1 - 1/32, half a step from 1 on either
    side; the authors rounded it to 0.9677083.
    """
    outermost = 0.9677083

    def quantiles(count: int) -> Tensor:
        steps = torch.linspace(outermost, 0.5, count + 1, dtype=torch.float64)[:-1]  # not 0.5: zero
        values: Tensor = torch.special.ndtri(steps)  # the inverse of the normal's cdf
        return values

    zero = torch.zeros(1, dtype=torch.float64)
    values = torch.cat([-quantiles(7), zero, quantiles(8)]).sort().values
    return values / values.max()


# The same sixteen as published (appendix E), which were computed in single precision and so are up
# to 1.2e-7 away from `normal_quantiles`: existing files depend on every bit of them.
CODEBOOK = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], dtype=torch.float32, device="cpu")  # fmt: skip
MIDPOINTS: list[float] = ((CODEBOOK[:-1] + CODEBOOK[1:]) / 2).tolist()
# Row b: the two values that the byte b holds, the first in its high half.
PAIRS = torch.stack([CODEBOOK.repeat_interleave(16), CODEBOOK.repeat(16)], dim=1)  # (256, 2)
PAIR = torch.complex64  # two float32, moved as one number


EXACT: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Whatever `torch.set_default_dtype` and `set_default_device` say."""


def dynamic_codebook() -> Tensor:
    """The 8-bit code of the scales: (256,), rising (Dettmers 2015, arXiv:1511.04561).

    The signed "dynamic" type: seven decades, from 10^-7 to 1. The e-th is divided into 2^e equal
    parts, and each part is represented by its middle. Both signs are there, and 0 and 1.
    """
    values = [0.0, 1.0]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2**e + 1, **EXACT)
        middles = 10.0 ** (e - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), **EXACT)


BINS = 65535
DYNAMIC = dynamic_codebook()
# The nearest code of each of 65,536 evenly spaced numbers in [-1, 1]: how bitsandbytes rounds on a
# CPU. At the borders between two codes it decides by the bin, not by the number.
NEAREST = torch.bucketize(
    torch.arange(BINS + 1, device="cpu").double() / BINS * 2 - 1,
    ((DYNAMIC[:-1] + DYNAMIC[1:]) / 2).double(),
).to(torch.uint8)  # fmt: skip


TABLES = {"pairs": PAIRS, "dynamic": DYNAMIC, "nearest": NEAREST}
_moved: dict[tuple[str, torch.device], Tensor] = {}


def _table(name: str, device: torch.device) -> Tensor:
    """A codebook on a device, copied there once, not for each product of `benchmarks/qlora.py`."""
    if device.type == "cpu":
        return TABLES[name]
    if (name, device) not in _moved:
        with torch.inference_mode(False):
            _moved[name, device] = TABLES[name].to(device)
    return _moved[name, device]


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
    if not absmax.is_meta and not absmax.isfinite().all():
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
    complex_ = device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()
    pair = PAIR if complex_ else torch.int64  # as long; not all know complex numbers
    index = scratch("index", step * half, torch.int64, device).view(-1, half)
    exact = None
    if dtype != torch.float32:
        exact = scratch("exact", step * half, pair, device).view(-1, half)
    # One table, as seen by every block: rows of a `gather` are shared among the threads, where
    # `index_select` has one.
    pairs = _table("pairs", device).view(pair).view(1, -1).expand(step, -1)  # (step, 256)
    parts = (codes.view(-1, half), absmax[:, None], out)
    for bytes_, scale, rounded in zip(*(part.split(max(step, 1)) for part in parts), strict=True):
        count = len(bytes_)
        both = rounded.view(pair) if exact is None else exact[:count]  # (count, 32)
        torch.gather(pairs[:count], 1, index[:count].copy_(bytes_), out=both)
        values = both.view(torch.float32).mul_(scale)  # (count, 64)
        if exact is not None:
            rounded.copy_(values)
    return out.view(-1)[:size].view(shape)


_kept = threading.local()
"""Memory that each thread keeps and overwrites."""


def scratch(name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size,), not initialized, valid until the next call with this name and dtype.

    On a CPU the system clears every new page, which takes longer than dequantizing into it. So each
    thread keeps the memory that its products need: 5 MB, and the largest weight in each dtype.
    Without it a QLoRA layer's step takes 1.45 to 1.6 times LoRA's (`benchmarks/qlora.py`), instead
    of 0.92 to 1.19.
    """
    lasts = device.type == "cpu" and not (torch.compiler.is_compiling() or is_transformed())
    key = f"{name} {dtype}"
    found: Tensor | None = getattr(_kept, key, None) if lasts else None
    if found is None or found.numel() < size:
        with torch.inference_mode(False):
            found = torch.empty(size, dtype=dtype, device=device)
        if lasts and type(found) is Tensor:  # not a fake tensor, which holds no values
            setattr(_kept, key, found)
    return found[:size]


def _to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The codes, two a byte, and the scale of each block, not yet quantized."""
    size = weight.numel()
    flat = weight.reshape(-1)
    blocks, half = -(-size // BLOCK), BLOCK // 2
    codes = torch.empty(blocks * half, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    step = CHUNK if weight.device.type == "cpu" else max(blocks, 1)
    for start in range(0, blocks, step):
        rows = slice(start, min(start + step, blocks))
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
    """By one thread: with more, the last bit of the sum would depend on their number."""
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
