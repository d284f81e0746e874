"""Which targets and which learning rate for the default preset? By the validation split alone.

    python benchmarks/grid.py [--jobs 2] [--epochs 6]

Every row is a run of `train.py --no-evaluate`: the test split is never read. Each method gets the
same number of learning rates. Runs share the machine, so their times say nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import ROOT, write_result

METHODS = {
    "LoRA r 8, q_proj v_proj": ["--rank", "8"],
    "LoRA r 8, all-linear": ["--rank", "8", "--targets", "all-linear"],
    "full fine-tuning": ["--method", "full"],
}
RATES = {
    "LoRA r 8, q_proj v_proj": (3e-3, 6e-3),
    "LoRA r 8, all-linear": (1e-3, 2e-3),
    "full fine-tuning": (3e-4, 6e-4),
}


def run(method: str, rate: float, epochs: int, model: str) -> dict[str, Any]:
    """Validation scores by epoch of one run."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "run"
        flags = [*METHODS[method], "--learning-rate", str(rate), "--epochs", str(epochs)]
        command = [sys.executable, str(ROOT / "train.py"), *flags, "--model", model]
        subprocess.run(
            [*command, "--no-evaluate", "--validation-limit", "50", "--output", str(output)],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        records = [json.loads(line) for line in (output / "log.jsonl").read_bytes().splitlines()]
    validation = [record for record in records if record["kind"] == "validation"]
    best = max(validation, key=lambda record: record["rouge1"])
    print(f"{method}, {rate:g}: {[round(v['rouge1'], 1) for v in validation]}", flush=True)
    return {"method": method, "learning_rate": rate, "best": best, "validation": validation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--model", default="pocket-bart")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    grid = [(method, rate) for method in options.methods for rate in RATES[method]]
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda row: run(*row, options.epochs, options.model), grid))
    settings = {"epochs": options.epochs, "model": options.model, "split": "validation, first 50"}
    print(write_result("grid", {"settings": settings, "rows": rows}))


if __name__ == "__main__":
    main()
