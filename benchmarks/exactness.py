"""How exact are merging and unmerging, in minilora and in other libraries?

    python benchmarks/exactness.py [--size 1024] [--cycles 100]

One layer: W (size, size) with the norm of a pre-trained weight, rank 8, alpha 20, an update of
about a tenth of W. Each contestant merges the same adapter into the same weight, in fp32, bf16 and
fp16:

- error: of the merged weight against W + s B A in float64, and the share of entries that are not
  the nearest number of the dtype;
- drift: the share of entries of W that differ after 1, 10 and 100 cycles of merging and unmerging,
  and the largest change relative to the largest entry of W. One series uses the same adapter in
  each cycle, another series a new one, as after more training or when switching between adapters.

"half-precision adapters" have A and B in the weight's dtype, as always in loralib; their error is
measured with their own A and B.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import loralib
import peft
import torch
from common import write_result
from torch import Tensor, nn

import minilora

RANK, ALPHA = 8, 20.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Contestant:
    """One layer of one library."""

    weight: Callable[[], Tensor]
    """(out, in), as it is now; PEFT exchanges the storage."""
    factors: tuple[Tensor, Tensor]
    """A (r, in) and B (out, r)."""
    merge: Callable[[], object]
    unmerge: Callable[[], object]


def with_peft(W: Tensor, safe: bool = False, half: bool = False) -> Contestant:
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"])
    model = peft.get_peft_model(nn.ModuleDict({"layer": linear(W)}), config)
    layer = model.base_model.model["layer"]
    if half:
        layer.to(W.dtype)
    return Contestant(
        lambda: layer.base_layer.weight.detach(),
        (layer.lora_A.default.weight.data, layer.lora_B.default.weight.data),
        lambda: layer.merge(safe_merge=safe),
        layer.unmerge,
    )


def with_loralib(W: Tensor) -> Contestant:
    out, in_ = W.shape
    layer = loralib.Linear(in_, out, r=RANK, lora_alpha=ALPHA, bias=False).to(W.dtype)
    layer.weight.data.copy_(W)
    return Contestant(
        lambda: layer.weight.detach(),
        (layer.lora_A.data, layer.lora_B.data),
        lambda: layer.train(False),  # it merges there
        lambda: layer.train(True),
    )


def with_minilora(W: Tensor) -> Contestant:
    layer = minilora.LoRALinear(linear(W), RANK, ALPHA)
    factors = layer.lora_A.data, layer.lora_B.data
    return Contestant(lambda: layer.weight.detach(), factors, layer.merge, layer.unmerge)


CONTESTANTS: dict[str, Callable[[Tensor], Contestant]] = {
    "PEFT": with_peft,
    "PEFT, safe merge": lambda W: with_peft(W, safe=True),
    "PEFT, half-precision adapters": lambda W: with_peft(W, half=True),
    "loralib": with_loralib,
    "minilora": with_minilora,
}


def linear(W: Tensor) -> nn.Linear:
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
    layer.weight.data.copy_(W)
    return layer


def measure(make: Callable[[Tensor], Contestant], W: Tensor, cycles: list[int]) -> dict[str, Any]:
    """The error of one merge and the drift of many, for one contestant and dtype."""
    draw = torch.Generator().manual_seed(1)
    contestant = make(W)
    A, B = contestant.factors
    draw_factors(contestant, draw)
    exact = W.double() + ALPHA / RANK * B.double() @ A.double()
    contestant.merge()
    merged = contestant.weight()
    result: dict[str, Any] = {
        "update": ((exact - W.double()).norm() / W.double().norm()).item(),
        "error": ((merged.double() - exact).norm() / exact.norm()).item(),
        "largest_error": (merged.double() - exact).abs().max().item(),
        "not_nearest": (merged != exact.to(W.dtype)).double().mean().item(),
    }
    contestant.unmerge()
    for name, anew in (("drift", False), ("drift_other_adapters", True)):
        contestant = make(W)
        draw_factors(contestant, draw)
        result[name] = {}
        for cycle in range(1, max(cycles) + 1):
            if anew:
                draw_factors(contestant, draw)
            contestant.merge()
            contestant.unmerge()
            if cycle in cycles:
                now = contestant.weight()
                change = (now.double() - W.double()).abs().max() / W.double().abs().max()
                share = (now != W).double().mean().item()
                result[name][str(cycle)] = {"changed": share, "largest": change.item()}
    return result


def draw_factors(contestant: Contestant, draw: torch.Generator) -> None:
    A, B = contestant.factors
    for factor, size in ((A, A.shape[1] ** -0.5), (B, 0.02)):
        factor.copy_(size * torch.randn(factor.shape, generator=draw))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--cycles", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--small", action="store_true", help="to see that it runs")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.size, arguments.cycles = 128, [1, 10]
    torch.manual_seed(0)
    W = 0.05 * torch.randn(arguments.size, arguments.size)  # about BART's
    results: dict[str, dict[str, Any]] = {}
    for name, make in CONTESTANTS.items():
        results[name] = {}
        for precision, dtype in DTYPES.items():
            figures = measure(make, W.to(dtype), arguments.cycles)
            results[name][precision] = figures
            drifts = figures["drift_other_adapters"].values()
            drift = ", ".join(f"{d['changed']:.2%}" for d in drifts)
            print(
                f"{name:30} {precision}  error {figures['error']:.2e}, not the nearest "
                f"{figures['not_nearest']:.3%}, changed after {arguments.cycles} cycles: {drift}"
            )
    # The README claims this of minilora. If it does not hold, nothing is written.
    for figures in results["minilora"].values():
        drifts = [*figures["drift"].values(), *figures["drift_other_adapters"].values()]
        assert all(d["changed"] == 0 for d in drifts), figures
    settings = {"size": arguments.size, "rank": RANK, "alpha": ALPHA}
    content = {"settings": settings, "results": results}
    print(write_result("exactness", content, arguments.small))


if __name__ == "__main__":
    main()
