"""One adapted layer on a GPU: benchmarks/layer.py with fewer shapes."""

import time
from types import SimpleNamespace
from typing import Any

from gpu_clock import Run
from gpu_models import RANK


def layers(run: Run, deadline: float) -> dict[str, Any]:
    import layer

    options = SimpleNamespace(device=run.device, rounds=11, warmup=3, repeat=5)
    shapes = [(1024, 1024, 1024), (1024, 1024, 16384), (768, 3072, 1024), (768, 3072, 16384)]
    if run.small:
        options.rounds, options.repeat = 2, 1
        shapes = [(64, 64, 64), (64, 128, 64)]
    results: dict[str, Any] = {}
    notes: list[str] = []
    about: dict[str, Any] = {
        "layers": "q and v, which read one input",
        "rank": RANK,
        "dropout": layer.DROPOUT,
    }
    about["bf16, no autocast"] = "PEFT computes the branch in float32, minilora in bf16"
    run.partial = {"about": about, "results": results, "notes": notes}
    for width, out, tokens in shapes:
        for precision in ("bf16 autocast", "bf16"):
            name = f"{width} -> {out}, {tokens} tokens, {precision}"
            if time.monotonic() > deadline:
                notes.append(f"{name}: left out, the time of this part was over")
                continue
            rows, missing = layer.measure(width, tokens, precision, 2, options, out)
            results[name] = rows
            notes += [note for note in missing if note not in notes]
            for contestant in (
                "PEFT, dropout",
                "minilora, eager, dropout",
                "minilora, fused, dropout",
            ):
                row = rows[contestant]
                print(
                    f"{name:40} {contestant:24} "
                    f"{row['forward_backward']['ratio']:5.2f} x the frozen layer's time, "
                    f"saved {row['saved_bytes'] / 1e6:7.1f} MB, "
                    f"peak {row.get('peak_bytes', 0) / 1e6:7.1f} MB"
                )
            run.write("layer", run.partial)
    print(*notes, sep="\n")
    return run.partial
