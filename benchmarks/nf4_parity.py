"""Does minilora's NF4 equal bitsandbytes' bit for bit? Over every weight shape of BART-large.

    OMP_NUM_THREADS=1 python benchmarks/nf4_parity.py

It counts differences; nothing is timed. For float32, bf16 and fp16, with and without double
quantization, it compares codes, absmax, offset and dequantized values, and NF4Linear's forward and
input gradient with `matmul_4bit`. It uses one thread, because the last bit of the offset, a mean,
depends on the number of threads.
"""

import argparse
import sys
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from common import beside_bitsandbytes, version, write_result
from torch import Tensor

from minilora import NF4Linear
from minilora.nf4 import CODEBOOK, MIDPOINTS, pack, unpack

# (out, in) of BART-large's weights, and how many of each are drawn.
SHAPES = {
    "embedding": ((50265, 1024), 1),
    "positions": ((1026, 1024), 1),
    "attention": ((1024, 1024), 8),
    "fc1": ((4096, 1024), 1),
    "fc2": ((1024, 4096), 1),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def draw(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Weights as in models, with a few difficult rows: outliers, ties, zeros."""
    weight = 0.03 * torch.randn(shape, generator=generator)
    weight[::7] *= 30 * torch.rand(weight[::7].shape, generator=generator) ** 8  # heavy tails
    ties = torch.tensor([*MIDPOINTS, *CODEBOOK.tolist(), 0.0])
    row = ties[torch.randint(len(ties), (shape[1],), generator=generator)]
    row[::64] = 1.0  # the absmax, so that each value lies on a midpoint or on a code
    weight[1], weight[2], weight[3, :512] = row, 0.5 * row, 0
    weight[4] *= 1e-6
    return weight.to(dtype)


def differing(left: Tensor, right: Tensor) -> int:
    """How many values differ, bit for bit (-0 is not 0)."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[left.element_size()]
    return int((left.reshape(-1).view(integer) != right.reshape(-1).view(integer)).sum())


def compare(weight: Tensor, double: bool) -> dict[str, int]:
    """How many codes, scales and dequantized values differ."""
    theirs, state = bnb.quantize_4bit(
        weight, quant_type="nf4", blocksize=64, compress_statistics=double
    )
    ours = pack(weight, double)
    counts = {
        "codes": differing(ours.codes, theirs),
        "absmax": differing(ours.absmax, state.absmax),
        "dequantized": differing(
            unpack(ours, tuple(weight.shape), weight.dtype), bnb.dequantize_4bit(theirs, state)
        ),
    }
    if ours.scales is not None and ours.offset is not None:
        counts["scales"] = differing(ours.scales, state.state2.absmax)
        counts["offset"] = differing(ours.offset, state.offset)
    return counts


def compare_product(weight: Tensor, double: bool, generator: torch.Generator) -> dict[str, int]:
    """How many entries of y = x W^T + b and of dL/dx differ."""
    out, in_ = weight.shape
    linear = torch.nn.Linear(in_, out, dtype=weight.dtype)
    linear.weight.data = weight
    layer = NF4Linear(linear, double)
    theirs, state = bnb.quantize_4bit(
        weight, quant_type="nf4", blocksize=64, compress_statistics=double
    )
    x = torch.randn(2, 48, in_, generator=generator).to(weight.dtype)
    dy = torch.randn(2, 48, out, generator=generator).to(weight.dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    ys = [
        layer(inputs[0]),
        bitsandbytes.matmul_4bit(inputs[1], theirs.t(), state, bias=linear.bias.detach()),
    ]
    gradients = [torch.autograd.grad(y, leaf, dy)[0] for y, leaf in zip(ys, inputs, strict=True)]
    return {
        "forward": differing(ys[0].detach(), ys[1].detach()),
        "input_gradient": differing(*gradients),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(options.seed)
    rows: list[dict[str, Any]] = []
    for precision, dtype in DTYPES.items():
        for name, (shape, count) in SHAPES.items():
            for _ in range(count):
                weight = draw(shape, dtype, generator)
                for double in (False, True):
                    differ = compare(weight, double)
                    if name in ("attention", "fc1", "fc2"):
                        differ |= compare_product(weight, double, generator)
                    row = {"dtype": precision, "weight": name, "shape": shape, "double": double}
                    rows.append(row | {"values": weight.numel(), "differing": differ})
                    print(precision, name, shape, "double" if double else "single", differ)
    values = sum(row["values"] for row in rows if row["double"])  # each once
    differing_total = sum(sum(row["differing"].values()) for row in rows)
    print(f"{values:,} values, with and without double quantization: {differing_total:,} differ")
    result = {
        "bitsandbytes": version("bitsandbytes"),
        "values": values,
        "differing": differing_total,
        "rows": rows,
    }
    print(write_result(beside_bitsandbytes("nf4_parity"), result))
    return int(differing_total > 0)


if __name__ == "__main__":
    sys.exit(main())
