"""The best learning rate of each method on the validation split of a data set.

    python benchmarks/grid.py [--data NAME] [--methods ...] [--jobs 2] [flags of train.py]

Writes grid_NAME.json, from which pocket.py takes its rates. Every method gets the same number of
rates at first; while the best of them is the lowest or the highest, one more runs, at half or at
twice that rate, two at most. A row is a run of `train.py --no-evaluate`, so the test split is never
read. The chosen rate has the highest ROUGE-1 of the last epoch's (greedy) summaries. The best of
all epochs would reward noise. Runs share the machine, so their times say nothing. Finished rows are
stored in --keep.
"""

import argparse
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    ROOT,
    WEIGHTS,
    digest,
    extended,
    flags_of_data,
    read_split,
    run_beside,
    run_digest,
    write_result,
)

METHODS = {
    "preset": ["--rank", "8"],
    "decoder": ["--rank", "8", "--targets", "decoder"],  # the encoder is computed once
    "q/v": ["--rank", "8", "--targets", "q_proj", "v_proj"],
    "all-linear": ["--rank", "8", "--targets", "all-linear"],
    "full": ["--method", "full"],
}
RATES = {
    "preset": (1e-3, 2e-3, 4e-3),
    "decoder": (1e-3, 2e-3, 4e-3),
    "q/v": (1e-3, 2e-3, 4e-3),
    "all-linear": (5e-4, 1e-3, 2e-3),
    "full": (1.25e-4, 2.5e-4, 5e-4),
}
MORE = 2  # further rates at most


def run(method: str, rate: float, options: argparse.Namespace, more: list[str]) -> dict[str, Any]:
    """Validation scores by epoch of one run."""
    flags = [*METHODS[method], "--learning-rate", str(rate), *flags_of_data(options.data), *more]
    kind = run_digest(flags)
    output = options.keep / f"{method.replace('/', '-')}-{rate:g}-{kind}"
    if not (output / "done").exists():
        shutil.rmtree(output, ignore_errors=True)  # of a run that was stopped
        output.mkdir(parents=True)
        command = [sys.executable, str(ROOT / "train.py"), *flags, "--no-evaluate"]
        run_beside([*command, "--output", str(output / "run")], output / "output.txt", options.jobs)
        (output / "done").touch()
    records = [json.loads(line) for line in (output / "run/log.jsonl").read_bytes().splitlines()]
    validation = [record for record in records if record["kind"] == "validation"]
    shown = [(round(v["loss"], 3), round(v["rouge1"], 1)) for v in validation]
    print(f"{method}, {rate:g}: {shown}", flush=True)
    return {"method": method, "learning_rate": rate, "validation": validation}


def measured(options: argparse.Namespace, more: list[str]) -> list[dict[str, Any]]:
    """The rows of all methods and rates, those beyond the first rates last."""
    done: dict[tuple[str, float], dict[str, Any]] = {}

    def loss(method: str, rate: float) -> float | None:
        row = done.get((method, rate))
        return -rouge_of(row) if row else None

    with ThreadPoolExecutor(options.jobs) as pool:
        while True:
            rates = {m: extended([*RATES[m]], partial(loss, m), MORE) for m in options.methods}
            left = [(m, rate) for m in rates for rate in rates[m] if (m, rate) not in done]
            if not left:
                return list(done.values())
            done |= zip(left, pool.map(lambda row: run(*row, options, more), left), strict=True)


def rouge_of(row: dict[str, Any]) -> float:
    """ROUGE-1 of the last epoch."""
    return float(row["validation"][-1]["rouge1"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else "", allow_abbrev=False
    )
    parser.add_argument("--data", default="bookings", help="embedded, or a path")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["preset", "full"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "grid")
    options, more = parser.parse_known_args()  # the other flags are for train.py
    read_split(options.data, "validation")
    rows = measured(options, more)
    chosen = {
        method: max((row for row in rows if row["method"] == method), key=rouge_of)["learning_rate"]
        for method in options.methods
    }
    print(f"chosen: {chosen}")
    name = Path(options.data).name
    told = {"data": name, "weights": digest([WEIGHTS]), "flags": more, "split": "validation"}
    print(write_result(f"grid_{name}", {"settings": told, "chosen": chosen, "rows": rows}))


if __name__ == "__main__":
    main()
