"""The cost of training one adapted linear layer, in time and memory.

    python benchmarks/layer.py [--device cuda] [--widths 768 1024] [--tokens 1024]

A square layer like q_proj of BART-base (768) or BART-large (1024), rank 8, inside a network (its
input requires a gradient), 8 x 128 tokens. It is measured alone, and as the q and v of an
attention, which read the same input. Contestants: the frozen layer, the layer trained in full,
PEFT, loralib, minilora's plain equation (eager) and its hand-written backward pass (fused), each
with and without dropout. Precisions:

    fp32           all in float32
    bf16           weight and input in bf16, no autocast
    bf16 autocast  frozen weight in bf16, input in fp32, the output of LayerNorm

Times: forward, and forward with backward, in turns; medians, and ratios to the frozen layer. Saved
bytes: what autograd keeps between forward and backward, each storage once, without parameters.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import peft
import torch
from common import alternate, keep_freed_memory, parser, summary, write_result
from torch import Tensor, nn

from minilora import LoRALinear

RANK, ALPHA, DROPOUT = 8, 32.0, 0.1
PRECISIONS = ("fp32", "bf16", "bf16 autocast")
FROZEN = "frozen"


def frozen(base: nn.Linear, _: float) -> nn.Module:
    return base.requires_grad_(False)


def full(base: nn.Linear, _: float) -> nn.Module:
    return base.requires_grad_(True)


def with_peft(base: nn.Linear, dropout: float) -> nn.Module:
    config = peft.LoraConfig(
        r=RANK, lora_alpha=int(ALPHA), lora_dropout=dropout, target_modules=["0"]
    )
    return peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]


def with_loralib(base: nn.Linear, dropout: float) -> nn.Module:
    import loralib

    out, in_ = base.weight.shape
    layer = loralib.Linear(in_, out, r=RANK, lora_alpha=int(ALPHA), lora_dropout=dropout)
    layer.to(base.weight.device)
    layer.weight.data, layer.bias.data = base.weight.data, base.bias.data
    layer.bias.requires_grad_(False)
    return layer


def with_minilora(base: nn.Linear, dropout: float, fused: bool = False) -> nn.Module:
    layer = LoRALinear(base, RANK, ALPHA, dropout)
    layer.fused = fused
    return layer


def with_fused(base: nn.Linear, dropout: float) -> nn.Module:
    return with_minilora(base, dropout, fused=True)


LIBRARIES: dict[str, Callable[[nn.Linear, float], nn.Module]] = {
    "PEFT": with_peft,
    "loralib": with_loralib,
    "minilora, eager": with_minilora,
    "minilora, fused": with_fused,
}


def adapters(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of a layer of any of the libraries."""
    a, b = (getattr(layer, name) for name in ("lora_A", "lora_B"))
    if isinstance(a, nn.ModuleDict):
        return a["default"].weight, b["default"].weight
    return a, b


def build(
    width: int, precision: str, device: str, heads: int, out: int
) -> tuple[dict[str, Any], list[str]]:
    """Each contestant as `heads` layers of the same weights and adapters, and what is missing."""
    generator = torch.Generator().manual_seed(0)
    bases = []
    for _ in range(heads):
        base = nn.Linear(width, out)
        base.weight.data = torch.randn(out, width, generator=generator) * 0.02
        bases.append(base.to(device, torch.float32 if precision == "fp32" else torch.bfloat16))
    pairs = [
        (
            torch.randn(RANK, width, generator=generator),
            torch.randn(out, RANK, generator=generator),
        )
        for _ in range(heads)
    ]
    missing = []
    made: dict[str, list[nn.Module]] = {
        FROZEN: [frozen(copy.deepcopy(base), 0) for base in bases],
        "full": [full(copy.deepcopy(base), 0) for base in bases],
    }
    for library, make in LIBRARIES.items():
        if library == "minilora, fused" and not hasattr(LoRALinear, "fused"):
            missing.append(f"{library}: this version has no fused backward")
            continue
        for dropout in (0.0, DROPOUT):
            name = f"{library}, dropout" if dropout else library
            try:
                layers = [make(copy.deepcopy(base), dropout) for base in bases]
            except ImportError as error:
                missing.append(f"{name}: {error}")
                continue
            for layer, values in zip(layers, pairs, strict=True):
                layer.train()  # loralib's train() returns None
                half = library == "loralib" and precision == "bf16"  # it does not cast
                for parameter, value in zip(adapters(layer), values, strict=True):
                    parameter.data = value.to(device, torch.bfloat16 if half else torch.float32) / 8
            made[name] = layers
    return made, missing


def context(precision: str, device: str) -> AbstractContextManager[Any]:
    if precision != "bf16 autocast":
        return nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def forward(layers: list[nn.Module], x: Tensor, precision: str) -> list[Tensor]:
    x = x.view_as(x)  # not a leaf: autocast would cache its cast, unlike inside a network
    with context(precision, str(x.device)):
        return [layer(x) for layer in layers]


def step(layers: list[nn.Module], x: Tensor, gradient: Tensor, precision: str) -> None:
    """Forward and backward, without the gradients of the step before."""
    x.grad = None
    for layer in layers:
        for parameter in layer.parameters():
            parameter.grad = None
    torch.autograd.backward(forward(layers, x, precision), [gradient] * len(layers))


def saved_bytes(run: Callable[[], object], parameters: set[int]) -> int:
    """Bytes that autograd keeps for backward: each storage once, without parameters."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in parameters:
            kept[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = run()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del alive
    return total


def peak(run: Callable[[], object]) -> int:
    """Most bytes on the GPU during a run, above what is there already; the first one warms up."""
    run()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def storages(layers: list[nn.Module]) -> set[int]:
    return {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}


def check(made: dict[str, list[nn.Module]], x: Tensor, precision: str) -> None:
    """Without dropout all compute the same function; the fused one uses its own backward."""
    outputs = {name: forward(layers, x, precision)[0] for name, layers in made.items()}
    tolerance = 1e-4 if precision == "fp32" else 0.03  # relative to the largest; bf16 has 8 bits
    wanted = outputs["PEFT"].float()
    assert (wanted - outputs[FROZEN].float()).abs().max() > 10 * tolerance
    for name, output in outputs.items():
        if name not in (FROZEN, "full") and "dropout" not in name:
            error = (output.float() - wanted).abs().max() / wanted.abs().max()
            assert error < tolerance, (name, precision, error)
        if "fused" in name:
            assert output.grad_fn is not None
            graph = [output.grad_fn, *(node for node, _ in output.grad_fn.next_functions)]
            assert any("LowRank" in type(node).__name__ for node in graph), (name, graph)


def measure(
    width: int, tokens: int, precision: str, heads: int, options: Any, out: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Times and bytes of each contestant on layers width -> out (None: width -> width)."""
    out = out or width
    made, missing = build(width, precision, options.device, heads, out)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    out_dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, tokens // 8, width, generator=generator).to(options.device, dtype)
    x.requires_grad_(True)
    gradient = torch.randn(*x.shape[:-1], out, generator=generator).to(options.device, out_dtype)
    check(made, x, precision)
    rows: dict[str, Any] = {
        name: {
            "saved_bytes": saved_bytes(
                lambda layers=layers: forward(layers, x, precision), storages(layers)
            )
        }
        for name, layers in made.items()
    }
    if x.is_cuda:
        for name, layers in made.items():
            rows[name]["peak_bytes"] = peak(
                lambda layers=layers: step(layers, x, gradient, precision)
            )

    def repeated(run: Callable[[], object]) -> Callable[[], object]:
        return lambda: [run() for _ in range(options.repeat)]

    tasks: dict[str, Callable[[list[nn.Module]], Callable[[], object]]] = {
        "forward": lambda layers: lambda: forward(layers, x, precision),
        "forward_backward": lambda layers: lambda: step(layers, x, gradient, precision),
    }
    for task, make in tasks.items():
        runs = {name: repeated(make(layers)) for name, layers in made.items()}
        seconds = alternate(runs, options.rounds, options.warmup)
        for name, figures in summary(seconds, FROZEN).items():
            ms = 1000 * figures["median_seconds"] / options.repeat
            rows[name][task] = {"median_ms": ms, "ratio": figures["ratio"]}
    return rows, missing


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--widths", type=int, nargs="+", default=[768, 1024])
    flags.add_argument("--tokens", type=int, default=1024, help="a multiple of 8")
    flags.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    flags.add_argument("--rounds", type=int, default=21)
    flags.add_argument("--warmup", type=int, default=3)
    flags.add_argument("--repeat", type=int, default=2, help="runs of a contestant in a turn")
    options = flags.parse_args()
    if options.small:
        options.widths, options.tokens, options.rounds = [64], 64, 5
    results: dict[str, Any] = {}
    notes: list[str] = []
    for width in options.widths:
        for precision in options.precisions:
            for heads in (1, 2):
                layers = "one layer" if heads == 1 else "q and v"
                rows, missing = measure(width, options.tokens, precision, heads, options)
                results.setdefault(str(width), {}).setdefault(precision, {})[layers] = rows
                notes += [note for note in missing if note not in notes]
                for name, row in rows.items():
                    print(
                        f"{width:5} {precision:13} {layers:9} {name:24} "
                        f"forward {row['forward']['ratio']:5.2f}  "
                        f"forward+backward {row['forward_backward']['ratio']:5.2f}  "
                        f"saved {row['saved_bytes'] / 1e6:7.2f} MB"
                    )
    settings = {
        **{key: value for key, value in vars(options).items() if key != "small"},
        "rank": RANK,
        "dropout": DROPOUT,
        "saved_bytes": "kept by autograd, each storage once, parameters left out",
        "loralib_in_bf16": "adapters in bf16: it casts nothing",
        "PEFT_in_bf16": "computes the branch in float32, minilora in bf16",
    }
    device = "" if options.device == "cpu" else f"_{torch.device(options.device).type}"
    result = {"settings": settings, "notes": notes, "results": results}
    print(*notes, sep="\n")
    print(write_result(f"layer{device}", result, options.small))


if __name__ == "__main__":
    keep_freed_memory()
    main()
