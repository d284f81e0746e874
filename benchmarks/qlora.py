"""What a base in four bits saves, and what it costs.

    python benchmarks/qlora.py [--rounds 31] [--step-rounds 31] [--no-loading] [--small]

It measures the speed of quantizing and dequantizing beside bitsandbytes (and torchao, if
installed), the training step of one layer at 1,024 tokens beside LoRA on a bf16 base, the
reconstruction error beside plain int4 and int8, the bits per weight in the tensors, and the memory
for loading a model of BART-large's size, each way of loading in a process of its own.

bitsandbytes has special code for AVX-512, so a processor without it has a separate result.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from common import (
    WEIGHTS,
    alternate,
    beside_bitsandbytes,
    digest,
    keep_freed_memory,
    summary,
    version,
    write_result,
)
from torch import Tensor, nn

import minilora
from minilora import LoRALinear, NF4Linear
from minilora.nf4 import pack, unpack

SHAPES = {"attention": (1024, 1024), "fc1": (4096, 1024), "fc2": (1024, 4096)}  # BART-large's
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Speed --------------------------------------------------------------------------------------------


def conversion(shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Quantizing and dequantizing one weight by each library, with double quantization."""
    import bitsandbytes.functional as bnb

    weight = (0.03 * torch.randn(shape)).to(DEVICE, dtype)
    packed = pack(weight)
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    to_4_bits: dict[str, Callable[[], object]] = {
        "bitsandbytes": lambda: bnb.quantize_4bit(
            weight, quant_type="nf4", compress_statistics=True
        ),
        "minilora": lambda: pack(weight),
    }
    back: dict[str, Callable[[], object]] = {
        "bitsandbytes": lambda: bnb.dequantize_4bit(codes, state),
        "minilora": lambda: unpack(packed, shape, dtype),
    }
    if find_spec("torchao") is not None:
        try:
            from torchao.dtypes.nf4tensor import to_nf4

            other = to_nf4(weight)
            to_4_bits["torchao"] = lambda: to_nf4(weight)
            back["torchao"] = other.get_original_weight
        except ImportError as error:
            print(f"torchao has no NF4 here: {error}", file=sys.stderr)
    return {
        "quantize": summary(alternate(to_4_bits, rounds), "bitsandbytes"),
        "dequantize": summary(alternate(back, rounds), "bitsandbytes"),
    }


def conversions(rounds: int) -> dict[str, Any]:
    """By shape, dtype and number of threads: one, and the default of torch."""
    results, threads = {}, torch.get_num_threads()
    for count in sorted({1, threads}):
        torch.set_num_threads(count)  # also bitsandbytes': both use one OpenMP
        for name, shape in SHAPES.items():
            for precision, dtype in DTYPES.items():
                key = f"{name} {precision}, {count} thread{'s' * (count > 1)}"
                results[key] = conversion(shape, dtype, rounds)
    torch.set_num_threads(threads)
    return results


def step(base: nn.Module, tokens: int) -> Callable[[], object]:
    """Forward and backward of one adapted layer on bf16 activations, as autocast gives them."""
    layer = LoRALinear(base, rank=8, alpha=32).to(DEVICE)
    nn.init.normal_(layer.lora_B, std=0.02)
    x = torch.randn(tokens, layer.in_features, device=DEVICE, dtype=torch.bfloat16)
    x.requires_grad_()  # layers below train too
    dy = torch.randn(tokens, layer.out_features, device=DEVICE, dtype=torch.bfloat16)

    def run() -> None:
        layer.lora_A.grad = layer.lora_B.grad = x.grad = None
        layer(x).backward(dy)

    return run


def steps(tokens: int, rounds: int) -> dict[str, Any]:
    """The training step of a layer of each shape: QLoRA beside LoRA on a bf16 base."""
    results = {}
    for name, (out, in_) in SHAPES.items():
        plain = nn.Linear(in_, out, dtype=torch.bfloat16)
        contestants = {
            "LoRA, bf16 base": step(plain, tokens),
            "QLoRA": step(NF4Linear(plain), tokens),
            "QLoRA, single quantization": step(NF4Linear(plain, double=False), tokens),
        }
        results[name] = summary(alternate(contestants, rounds), "LoRA, bf16 base")
    return results


# Error --------------------------------------------------------------------------------------------


def plain_integers(weight: Tensor, bits: int) -> Tensor:
    """Rounded to evenly spaced, symmetric numbers, with one float32 scale for each 64."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((blocks / scale.clamp(min=1e-38)).round() * scale).view(weight.shape)


def errors(name: str) -> dict[str, Any]:
    """||rounded - W|| / ||W|| of each kind of layer of a model, averaged."""
    from minilora.summarization.model.loading import load_model

    linears = {
        path: module.weight.detach()
        for path, module in load_model(name, torch.device("cpu")).named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    }
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "NF4": lambda W: unpack(pack(W, double=False), tuple(W.shape)),
        "NF4, double quantization": lambda W: unpack(pack(W), tuple(W.shape)),
        "int4": lambda W: plain_integers(W, 4),
        "int8": lambda W: plain_integers(W, 8),
    }
    layers = {
        path: {kind: ((f(W) - W).norm() / W.norm()).item() for kind, f in kinds.items()}
        for path, W in linears.items()
    }
    means = {kind: sum(row[kind] for row in layers.values()) / len(layers) for kind in kinds}
    return {"model": name, "mean": means, "layers": layers}


# Memory -------------------------------------------------------------------------------------------

# How a process reads the model. It prints bytes: of its peak before and after, of its tensors.
LOAD = """
import json, resource, sys, threading, time
import torch
from minilora.nf4.model import quantize, quantize_report
from minilora.summarization.model.four_bits import FourBits
from minilora.summarization.model.loading import load_model
how, path = sys.argv[1:]
def anonymous():  # without pages of the file itself, which the system can drop
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
highest, stop = 0, threading.Event()
def watch():
    global highest
    while not stop.wait(0.002):
        highest = max(highest, anonymous())
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(path, torch.device("cpu"), FourBits() if how == "layer by layer" else None)
if how == "whole, then quantized":
    quantize(model)
stop.set()
watcher.join()
tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
report = quantize_report(model)
print(json.dumps({
    "peak_bytes": max(highest, anonymous()) - before,
    "tensor_bytes": sum(t.nbytes for t in tensors.values()),
    "largest_weight_bytes": 4 * 4096 * 1024,
    "linears": len(report.modules), "weights": report.weights,
    "before": report.before, "after": report.after,
}))
"""


def loading() -> dict[str, Any]:
    """Peak memory of loading a model of BART-large's size in three ways, with random weights."""
    from transformers import BartConfig, BartForConditionalGeneration

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        config = BartConfig()  # the defaults are bart-large's
        BartForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
        for how in ("whole", "whole, then quantized", "layer by layer"):
            command = [sys.executable, "-c", LOAD, how, folder]
            plain = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=plain)
            results[how] = json.loads(done.stdout.splitlines()[-1])
            print(how, results[how])
    return results


def bits() -> dict[str, float]:
    """Bits per weight, from the tensors of BART-large's linear layers."""
    found = {}
    for name, double in (("double", True), ("single", False)):
        model = nn.Sequential(*(nn.Linear(in_, out) for out, in_ in SHAPES.values()))
        found[name] = minilora.quantize(model, double=double).bits
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--step-rounds", type=int, default=31, help="few where bf16 is slow")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--model", default="pocket-bart", help="whose layers' errors are shown")
    parser.add_argument("--no-loading", action="store_true", help="leave the memory out")
    parser.add_argument("--small", action="store_true", help="to see that it runs")
    options = parser.parse_args()
    if options.small:
        options.rounds, options.step_rounds, options.tokens, options.no_loading = 2, 2, 64, True
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "weights": digest([WEIGHTS]),  # of pocket-bart, for the errors
        "bitsandbytes": version("bitsandbytes"),
        "settings": {
            "rounds": options.rounds,
            "step_rounds": options.step_rounds,
            "tokens": options.tokens,
            "device": DEVICE.type,
            "vectors": torch.backends.cpu.get_cpu_capability(),
        },
        "bits": bits(),
        "error": errors(options.model),
        "conversion": conversions(options.rounds),
        "step": steps(options.tokens, options.step_rounds),
    }
    for name, rows in result["conversion"].items():
        ratios = {task: round(rows[task]["minilora"]["ratio"], 2) for task in rows}
        print(f"{name}: {ratios} of bitsandbytes' time")
    for name, rows in result["step"].items():
        print(f"step, {name}: {rows['QLoRA']['ratio']:.3f} of LoRA's")
    print(result["bits"], result["error"]["mean"])
    if not options.no_loading:
        result["loading"] = loading()
    name = "qlora_cuda" if DEVICE.type == "cuda" else beside_bitsandbytes("qlora")
    print(write_result(name, result, options.small))


if __name__ == "__main__":
    keep_freed_memory()
    main()
