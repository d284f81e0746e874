"""The best learning rate of each method on the validation split.

    python benchmarks/grid.py [--jobs 2] [--epochs 4]

Every method gets the same number of rates. A row is a run of `train.py --no-evaluate`, so the test
split is never read. The chosen rate has the highest ROUGE-1 of the last epoch's (greedy) summaries.
The best of all epochs would reward noise. Runs share the machine, so their times say nothing.
Finished rows are stored in --keep.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import ROOT, WEIGHTS, digest, write_result

METHODS = {
    "q/v": ["--rank", "8", "--targets", "q_proj", "v_proj"],
    "all-linear": ["--rank", "8", "--targets", "all-linear"],
    "full": ["--method", "full"],
}
RATES = {
    "q/v": (2e-3, 4e-3, 8e-3),
    "all-linear": (1e-3, 2e-3, 4e-3),
    "full": (2.5e-4, 5e-4, 1e-3),
}


def run(method: str, rate: float, options: argparse.Namespace, more: list[str]) -> dict[str, Any]:
    """Validation scores by epoch of one run."""
    flags = [*METHODS[method], "--learning-rate", str(rate), "--epochs", str(options.epochs)]
    kind = digest([WEIGHTS], *flags, *more)[:8]
    output = options.keep / f"{method.replace('/', '-')}-{rate:g}-{options.epochs}-{kind}"
    if not (output / "done").exists():
        shutil.rmtree(output, ignore_errors=True)  # of a run that was stopped
        command = [sys.executable, str(ROOT / "train.py"), *flags, *more, "--no-evaluate"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if options.jobs > 1:
            environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        subprocess.run(
            [*command, "--output", str(output)],
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        (output / "done").touch()
    records = [json.loads(line) for line in (output / "log.jsonl").read_bytes().splitlines()]
    validation = [record for record in records if record["kind"] == "validation"]
    shown = [(round(v["loss"], 3), round(v["rouge1"], 1)) for v in validation]
    print(f"{method}, {rate:g}: {shown}", flush=True)
    return {"method": method, "learning_rate": rate, "validation": validation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "grid")
    parser.add_argument("--name", default="grid", help="benchmarks/results/NAME.json")
    options, more = parser.parse_known_args()  # the other flags are for train.py
    grid = [(method, rate) for method in options.methods for rate in RATES[method]]
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda row: run(*row, options, more), grid))
    chosen = {
        method: max(
            (row for row in rows if row["method"] == method),
            key=lambda row: row["validation"][-1]["rouge1"],
        )["learning_rate"]
        for method in options.methods
    }
    print(f"chosen: {chosen}")
    settings = {"epochs": options.epochs, "flags": more, "split": "validation"}
    print(write_result(options.name, {"settings": settings, "chosen": chosen, "rows": rows}))


if __name__ == "__main__":
    main()
