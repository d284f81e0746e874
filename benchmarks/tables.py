"""Write the tables of README.md anew from benchmarks/results/*.json.

    python benchmarks/tables.py            write them
    python benchmarks/tables.py --check    exit code 1 if one is not what the results say

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Figures are never typed by hand.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
Rows = list[list[str]]


def merge_latency(result: dict[str, Any]) -> Rows:
    """One row a contestant: the time of a forward pass and of greedy decoding."""
    tasks = result["results"]
    rows = [["BART-base's dimensions, fp32", "one forward", "", "64 tokens, greedy", ""]]
    for name in tasks["forward"]:
        row = [name]
        for task in ("forward", "decode"):
            figures = tasks[task][name]
            row += [f"{1000 * figures['median_seconds']:,.0f} ms", f"{figures['ratio']:.3f}"]
        rows.append(row)
    return rows


def exactness(result: dict[str, Any]) -> Rows:
    """One row a library: how far merged weights and unmerged ones are from what they should be."""
    rows = [["", "bf16", "fp16", "1 cycle", "10 cycles", "100 cycles"]]
    for name, figures in result["results"].items():
        wrong = [f"{figures[dtype]['not_nearest']:.3%}" for dtype in ("bf16", "fp16")]
        drift = figures["bf16"]["drift_other_adapters"]
        rows.append([name, *wrong, *(f"{drift[n]['changed']:.1%}" for n in ("1", "10", "100"))])
    return rows


def pocket(result: dict[str, Any]) -> Rows:
    """One row: what `python train.py --rank 8` gained."""
    rows = [["", "ROUGE-1", "ROUGE-2", "ROUGE-L", "tokens"]]
    scores = {key: result[key] for key in ("base", "finetuned")}
    names = {"base": "pocket-bart as it ships", "finetuned": "with LoRA, rank 8"}
    measures = ("rouge1", "rouge2", "rougeL", "gen_len")
    rows += [[names[key], *(f"{scores[key][m]:.1f}" for m in measures)] for key in names]
    difference = result["intervals"]["difference"]
    cells = [f"{d[0]:+.1f} [{d[1]:+.1f}, {d[2]:+.1f}]" for d in map(difference.get, measures)]
    return [*rows, ["difference, 95% interval", *cells]]


TABLES: dict[str, Callable[[dict[str, Any]], Rows]] = {
    "merge_latency": merge_latency,
    "exactness": exactness,
    "default_run": pocket,
}


def markdown(rows: Rows) -> str:
    """The first row is the head; numbers to the right."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    rule = f"| --- |{' ---: |' * (len(rows[0]) - 1)}"
    return "\n".join([head, rule, *body])


def source(name: str, result: dict[str, Any]) -> str:
    """Where the figures come from."""
    machine = result["machine"]
    hardware = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
    return (
        f"Measured {result['date']} on {hardware}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}: [results/{name}.json](benchmarks/results/{name}.json)."
    )


def render(text: str) -> str:
    """The README with every table as the results say."""

    def table(found: re.Match[str]) -> str:
        name = found.group(1)
        path = ROOT / "benchmarks" / "results" / f"{name}.json"
        result = json.loads(path.read_text())
        body = f"{markdown(TABLES[name](result))}\n\n{source(name, result)}"
        return f"<!-- table: {name} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> int:
    path = ROOT / "README.md"
    text = path.read_text()
    wanted = render(text)
    if "--check" in sys.argv:
        print(
            "README.md is up to date" if wanted == text else "README.md: run this without --check"
        )
        return int(wanted != text)
    path.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
