"""The first command of a new user, `python train.py --rank 8`, timed as a whole process.

    python benchmarks/default_run.py [flags of train.py]

Writes the scores of base and fine-tuned model, their intervals, and minutes and memory.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, WEIGHTS, digest, write_result


def main() -> None:
    weights = digest([WEIGHTS])
    flags = ["--rank", "8", *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "run"
        command = [sys.executable, str(ROOT / "train.py"), *flags, "--output", str(output)]
        start = time.monotonic()
        subprocess.run(command, check=True)
        seconds = time.monotonic() - start
        evaluation = json.loads((output / "evaluation.json").read_bytes())
        records = [json.loads(line) for line in (output / "log.jsonl").read_bytes().splitlines()]
    start_record = next(record for record in records if record["kind"] == "start")
    end_record = next(record for record in records if record["kind"] == "end")
    del evaluation["examples"]
    result = {
        "weights": weights,
        "command": f"python train.py {' '.join(flags)}",
        "whole_process_seconds": round(seconds, 1),
        "training_seconds": end_record["seconds"],
        "peak_bytes": end_record["peak_bytes"],
        "trainable": start_record["trainable"],
        "total": start_record["total"],
        "validation": [record for record in records if record["kind"] == "validation"],
        **evaluation,
    }
    print(write_result("default_run", result))


if __name__ == "__main__":
    main()
