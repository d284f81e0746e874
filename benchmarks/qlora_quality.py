"""The cost of a 4-bit base in ROUGE: LoRA, QLoRA, and QLoRA with LoftQ's start, by seed.

    python benchmarks/qlora_quality.py [--data bookings] [--seeds 0 1 2] [--name qlora_quality]

Other flags are those of train.py. Every row is `python train.py` as a whole process: test scores,
minutes, memory. With --jobs 2 two of them run side by side on one core each, and minutes are those
of one core. A difference between two methods has its paired bootstrap interval over the dialogues,
whose scores are means over the seeds. Finished runs are stored in --keep, so an interrupted
benchmark continues. Those of other flags, weights or code do not count.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import ROOT, WEIGHTS, digest, run_digest, write_result

METHODS = {
    "LoRA": ["--method", "lora"],
    "QLoRA": ["--method", "qlora"],
    "QLoRA, LoftQ": ["--method", "qlora", "--init", "loftq"],
}


def run(method: str, seed: int, jobs: int, keep: Path, flags: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if jobs > 1:
        environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    flags = ["--rank", "8", *METHODS[method], "--seed", str(seed), *flags]
    short = method.replace(", ", "-")
    output = keep / f"{short}-{seed}-{run_digest(flags)}"
    if not (output / "minutes.txt").exists():
        shutil.rmtree(output, ignore_errors=True)  # of a run that was stopped
        command = [sys.executable, str(ROOT / "train.py"), *flags, "--output", str(output)]
        start = time.monotonic()
        subprocess.run(
            command,
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        beside = output / "minutes.txt.new"
        beside.write_text(str((time.monotonic() - start) / 60))
        beside.rename(output / "minutes.txt")  # the last file of a finished run
    evaluation = json.loads((output / "evaluation.json").read_bytes())
    records = [json.loads(line) for line in (output / "log.jsonl").read_bytes().splitlines()]
    end = next(record for record in records if record["kind"] == "end")
    row = {
        "method": method,
        "seed": seed,
        "finetuned": evaluation["finetuned"],
        "base": evaluation["base"],  # for QLoRA the quantized base
        "each": [example["rouge1_finetuned"] for example in evaluation["examples"]],
        "minutes": round(float((output / "minutes.txt").read_text()), 2),
        "training_minutes": round(end["seconds"] / 60, 2),
        "peak_bytes": end["peak_bytes"],
    }
    print(
        f"{method}, seed {seed}: ROUGE-1 {row['finetuned']['rouge1']:.2f} (base "
        f"{row['base']['rouge1']:.2f}), {row['minutes']} minutes",
        flush=True,
    )
    return row


def each_dialogue(rows: list[dict[str, Any]], method: str) -> list[float]:
    """ROUGE-1 of every test dialogue, the mean over the seeds."""
    columns = zip(*(row["each"] for row in rows if row["method"] == method), strict=True)
    return [statistics.mean(column) for column in columns]


def means(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the seeds: the mean scores, the deviation of ROUGE-1, its difference from QLoRA's."""
    from minilora.summarization.evaluation.rouge import bootstrap

    found = {}
    beside = each_dialogue(rows, "QLoRA")
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]
        rouge1 = [row["finetuned"]["rouge1"] for row in mine]
        pairs = zip(each_dialogue(rows, method), beside, strict=True)
        difference = bootstrap([a - b for a, b in pairs])
        found[method] = {
            "finetuned": {
                name: statistics.mean(row["finetuned"][name] for row in mine)
                for name in mine[0]["finetuned"]
            },
            "base_rouge1": statistics.mean(row["base"]["rouge1"] for row in mine),
            "rouge1_deviation": statistics.stdev(rouge1) if len(mine) > 1 else 0.0,
            "less_qlora": [difference.mean, difference.low, difference.high],
            "minutes": statistics.mean(row["minutes"] for row in mine),
            "peak_bytes": max(row["peak_bytes"] for row in mine),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--data", default="bookings")
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "qlora", help="finished runs")
    parser.add_argument("--name", default="qlora_quality", help="of the result")
    options, flags = parser.parse_known_args()
    flags = ["--data", options.data, *flags]
    grid = [(method, seed) for seed in options.seeds for method in METHODS]
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda row: run(*row, options.jobs, options.keep, flags), grid))
    result = {"weights": digest([WEIGHTS]), "data": options.data, "flags": flags}
    result |= {"jobs": options.jobs, "seeds": options.seeds, "means": means(rows)}
    result["rows"] = [{key: row[key] for key in row if key != "each"} for row in rows]
    if options.jobs > 1:
        import torch

        torch.set_num_threads(1)  # as each run, for the caption
    print(write_result(options.name, result))


if __name__ == "__main__":
    main()
