"""The bytes that a data-parallel step sends, with LoRA and with full fine-tuning.

    python benchmarks/scaling.py            print the table of docs/scaling.md
    python benchmarks/scaling.py --update   write it there

Arithmetic on the shapes of the models, which are built without weights (on PyTorch's `meta`
device). Nothing is timed. In each step the gradients of the parameters that train are summed over
the processes, 4 bytes each (float32). In a ring all-reduce over n processes each process sends
2 (n - 1) / n times as much (Patarasuk and Yuan 2009). The columns of seconds divide this by the
speed of the link, without latency and without overlap with the backward pass.
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, BartConfig, BartForConditionalGeneration

import minilora
from minilora import LoRAConfig
from minilora.summarization.presets import embedded

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- table: benchmarks/scaling.py -->\n", "<!-- end of the table -->\n"
RANK, TARGETS = 8, ("q_proj", "v_proj")  # the adapter of the presets for hub models


def shapes() -> dict[str, BartConfig]:
    """facebook/bart-base and -large by the sizes of their config.json (Lewis et al. 2020)."""
    found = {"pocket-bart": AutoConfig.from_pretrained(embedded("pocket-bart"))}
    for name, layers, width, heads in (("bart-base", 6, 768, 12), ("bart-large", 12, 1024, 16)):
        sizes: dict[str, int] = {"vocab_size": 50265, "d_model": width}
        for side in ("encoder", "decoder"):
            sizes |= {
                f"{side}_layers": layers,
                f"{side}_attention_heads": heads,
                f"{side}_ffn_dim": 4 * width,
            }
        found[name] = BartConfig(**sizes, max_position_embeddings=1024)
    return found


def trainable(config: BartConfig) -> dict[str, int]:
    """Parameters that train, by method."""
    with torch.device("meta"):
        model = BartForConditionalGeneration(config)
    every = sum(parameter.numel() for parameter in model.parameters())
    report = minilora.inject(model, LoRAConfig(rank=RANK, targets=TARGETS))
    return {"LoRA": report.trainable, "full": every}


def sent(parameters: int, processes: int) -> float:
    """Bytes that each process of a ring sends for one step."""
    return 4 * parameters * 2 * (processes - 1) / processes


def table() -> str:
    lines = [
        "| model | method | parameters that train | gradients of a step | at 1 Gbit/s | 10 Gbit/s "
        "| 100 Gbit/s | 300 GB/s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    links = [1e9 / 8, 10e9 / 8, 100e9 / 8, 300e9]  # bytes per second
    for name, config in shapes().items():
        for method, count in trainable(config).items():
            times = [time_of(sent(count, 8) / link) for link in links]
            cells = [name, method, f"{count:,}", size_of(4 * count), *times]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def size_of(count: float) -> str:
    return f"{count / 1e6:,.2f} MB" if count < 1e8 else f"{count / 1e6:,.0f} MB"


def time_of(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--update", action="store_true", help=f"write the table into {PAGE.name}")
    arguments = parser.parse_args()
    new = table()
    print(new)
    if arguments.update:
        text = PAGE.read_text(encoding="utf-8")
        pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
        PAGE.write_text(pattern.sub(lambda _: f"{BEGIN}\n{new}\n{END}", text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
