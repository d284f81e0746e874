"""Train for thousands of steps and watch memory and open files: both must stay flat.

    python -m tests.soak --steps 2000

A toy model, with a validation after every epoch and a checkpoint every 50 steps. Resident memory
and file handles are read from /proc after every step, Python's own blocks from the interpreter,
once the allocator (glibc's) has given back what is free: what stays is in use.
Caches and the allocator's free lists fill for thousands of steps, ever more slowly; the line is
fitted to the `--steps` after `--warmup`. Memory is flat if the line rises by less than the readings
scatter around it (one standard deviation). Beside it stands the slope's interval over resamples of
the residuals in blocks (a moving-block bootstrap, Künsch 1989: neighbours are not independent).
"""

import argparse
import ctypes
import json
import os
import sys
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

from minilora.summarization.flags import parse_run
from minilora.summarization.training.session import open_session
from minilora.summarization.training.trainer import Trainer, fit
from tests.helpers import SMALL, save_bart, save_data

ROWS, BATCH = 240, 3  # 40 steps an epoch, two batches each
RESAMPLES = 500


def readings(folder: Path, steps: int) -> dict[str, "array[int]"]:
    """Resident bytes, open files and blocks of Python objects after each step of a run."""
    save_bart(folder / "bart")
    save_data(folder / "data", train=ROWS, validation=6)
    data = ["--model", str(folder / "bart"), "--data", str(folder / "data"), *SMALL]
    epochs = str(-(-steps // (ROWS // BATCH // 2)))
    more = ["--epochs", epochs, "--max-steps", str(steps), "--no-evaluate"]
    run = parse_run([*data, *more, "--checkpoint-steps", "50", "--output", str(folder / "run")])
    # Made beforehand, so that the readings do not grow what they read.
    found = {name: array("q", bytes(8 * steps)) for name in ("memory", "files", "blocks")}
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
    page, step = os.sysconf("SC_PAGE_SIZE"), Trainer.step

    def watched(trainer: Trainer, group: Any) -> dict[str, float]:
        measures = step(trainer, group)
        now = trainer.progress.step
        trim(0)
        found["memory"][now] = int(Path("/proc/self/statm").read_text().split()[1]) * page
        found["files"][now] = len(list(Path("/proc/self/fd").iterdir()))
        found["blocks"][now] = sys.getallocatedblocks()
        return measures

    Trainer.step = watched  # type: ignore[method-assign]
    try:
        fit(open_session(run), folder / "run")
    finally:
        Trainer.step = step  # type: ignore[method-assign]
    return found


def slope(values: Sequence[int], seed: int = 0) -> dict[str, float]:
    """A fitted line per step, its 95% bootstrap interval, the readings' scatter around it."""
    y = torch.tensor(list(values), dtype=torch.float64)
    n = len(values)
    x = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    fitted = (x @ y / (x @ x)).item()
    residuals = y - y.mean() - fitted * x
    block = max(1, n // 10)  # several epochs and checkpoints
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(n - block + 1, (RESAMPLES, -(-n // block)), generator=draw)
    index = (starts[:, :, None] + torch.arange(block)).reshape(RESAMPLES, -1)[:, :n]
    noise = residuals[index] @ x / (x @ x)
    low, high = torch.quantile(noise, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    scatter = residuals.std().item()
    return {"per_step": fitted, "low": fitted + low, "high": fitted + high, "scatter": scatter}


def plot(path: Path, memory: Sequence[int], files: Sequence[int]) -> None:
    """Both over the steps."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "soak"  # the same figures, the same file
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, sharex=True, figsize=(7, 4), height_ratios=(3, 1))
    upper.plot([value / 2**20 for value in memory], linewidth=1)
    upper.set_ylabel("resident MiB")
    upper.set_ylim(0, max(memory) / 2**20 * 1.1)
    lower.plot(files, linewidth=1)
    lower.set_ylabel("open files")
    lower.set_ylim(0, max(files) + 2)
    lower.set_xlabel("optimizer step")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="steps the line is fitted to")
    parser.add_argument("--warmup", type=int, default=4000, help="steps before them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = readings(Path(folder), arguments.warmup + arguments.steps)
    memory, files, after = found["memory"], found["files"], arguments.warmup
    trends = {name: slope(found[name][after:]) for name in ("memory", "blocks")}
    trend, blocks = trends["memory"], trends["blocks"]
    result = {
        "steps": len(memory),
        "fitted_after_step": after,
        "resident_bytes_then": memory[after],
        "resident_bytes_at_the_end": memory[-1],
        "rise_bytes": round(trend["per_step"] * arguments.steps),
        "scatter_bytes": round(trend["scatter"]),
        "flat": trend["per_step"] * arguments.steps < trend["scatter"],
        "slope_bytes_per_step": {name: round(value, 2) for name, value in trend.items()},
        "slope_interval_holds_zero": trend["low"] <= 0 <= trend["high"],
        "growth_per_1000_steps_in_percent": round(1e5 * trend["per_step"] / memory[after], 4),
        "slope_python_blocks_per_step": {k: round(value, 4) for k, value in blocks.items()},
        "python_blocks_interval_holds_zero": blocks["low"] <= 0 <= blocks["high"],
        "open_files": {"fewest": min(files[after:]), "most": max(files[after:])},
        "every_tenth_resident_mib": [round(value / 2**20, 2) for value in memory[::10]],
    }
    print(json.dumps({k: v for k, v in result.items() if not k.startswith("every")}, indent=2))
    from benchmarks.common import RESULTS, write_result

    print(write_result("soak", result))
    plot(RESULTS / "soak.svg", memory, files)
    return 0 if result["flat"] and min(files[after:]) == max(files[after:]) else 1


if __name__ == "__main__":
    sys.exit(main())
