"""Are the lengths that `train.py` takes from the training references near the best ones?

    python benchmarks/lengths.py --shared ../shared/data --work /tmp/lengths [--only samsum]

For each data set pocket-bart is fine-tuned on a subset, and the validation rows are summarized with
every setting of a grid and with those of `fit_lengths`. The grid's best setting is chosen on the
same rows on which it is scored, so the difference is an upper bound of the loss. The rule of
`fit_lengths` was found on a first draw of rows and is tested on a second one, of other rows. On
MTS-Dialog it lost more than 2 there, on 40 rows, so a third draw has 120 rows, with the model of
the second. A model and a setting that are in --work, of the same weights and code, are not computed
again. The result is written when all sets and draws are there.
"""

import itertools
import json
import lzma
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import WEIGHTS, digest, parser, read_lines, run_digest, write_result

import minilora
from minilora.summarization.cli import train_main
from minilora.summarization.data.batches import Encoded, encode
from minilora.summarization.data.lengths import fit_lengths
from minilora.summarization.data.reading import Example
from minilora.summarization.evaluation.generate import summarize
from minilora.summarization.evaluation.rouge import rouge
from minilora.summarization.model.loading import load_model, load_tokenizer
from minilora.summarization.settings import RunConfig

GRID = {
    "min_length": (0, 5, 10, 20, 40),
    "max_length": (30, 60, 120),
    "length_penalty": (1.0, 2.0),
}
PAIRS = "pretraining/dialogue_summary_pairs.jsonl.xz"
SETS = {"samsum": (None, 320, 40), "MTS-Dialog": (PAIRS, 320, 40), "QMSum": (PAIRS, 240, 32)}
"""The file of pairs, and how many dialogues of the first draw train and are scored."""
DRAWS = ("first", "second", "third")
SCORED = {"second": 40, "third": 120}
THIRD = ("MTS-Dialog",)
"""The sets that have a third draw."""
MARGIN = 2.0
"""ROUGE-1 that may be lost."""
TRAINING = ["--epochs", "2", "--validation-limit", "1", "--no-evaluate", "--no-report"]


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--shared", type=Path, required=True, help="the folder with samsum/ ...")
    flags.add_argument("--work", type=Path, required=True, help="runs, and what was measured")
    flags.add_argument("--only", choices=SETS, action="append", help="instead of all three")
    flags.add_argument("--draw", choices=DRAWS, action="append", help="instead of both")
    options = flags.parse_args()
    torch.set_num_threads(1)
    weights, root = digest([WEIGHTS]), options.work / run_digest()[:8]
    found: dict[str, dict[str, Any]] = {draw: {} for draw in options.draw or DRAWS}
    for draw, name in itertools.product(found, options.only or SETS):
        if draw == "third" and name not in THIRD:
            continue
        work, rows = root / draw / name, draw_rows(name, options.shared, draw)
        work.mkdir(parents=True, exist_ok=True)
        for split, kept in rows.items():
            (work / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        found[draw][name] = measure(work, root / draw.replace("third", "second") / name)
        print(draw, name, {k: v for k, v in found[draw][name].items() if k != "grid"})
    if not (options.only or options.draw):
        print(write_result("lengths", {"weights": weights, "model": "pocket-bart", "draws": found}))


def draw_rows(name: str, shared: Path, draw: str) -> dict[str, list[dict[str, str]]]:
    """The rows that train and that are scored, drawn without looking at them.

    The second draw scores rows that the first does not have, and trains on such rows too, but for
    QMSum: it has only 72 others, so rows of the first draw train as well. The third draw scores
    rows that were neither scored before nor train the second draw's model.
    """
    pairs, train, validation = SETS[name]
    if pairs:
        with lzma.open(shared / pairs, "rt", encoding="utf-8") as lines:
            rows = [row for row in map(json.loads, lines) if row["source"] == name]
        random.Random(0).shuffle(rows)
        parts = {"train": rows[validation:], "validation": rows[:validation]}
    else:
        files = {"train": "train", "validation": "val"}
        parts = {k: json.loads((shared / name / f"{v}.json").read_text()) for k, v in files.items()}
    parts = {
        split: [
            {k: row[k] for k in ("id", "dialogue", "summary")} for row in rows if row["dialogue"]
        ]
        for split, rows in parts.items()
    }
    first = {"train": sample(1, parts["train"], train)}
    first["validation"] = sample(1, parts["validation"], validation)
    others = without(parts["train"], first["train"])
    unseen = others if pairs else without(parts["validation"], first["validation"])
    second = {"validation": sample(2, unseen, SCORED["second"])}
    second["train"] = sample(2, without(others, second["validation"]), train)
    second["train"] += sample(3, first["train"], train - len(second["train"]))
    left = first["train"] if pairs else without(unseen, second["validation"])
    left = without(left, second["train"])
    third = {"train": second["train"], "validation": sample(3, left, SCORED["third"])}
    return {"first": first, "second": second, "third": third}[draw]


def without(rows: list[Any], others: list[Any]) -> list[Any]:
    return [row for row in rows if row not in others]


def sample(seed: int, rows: list[Any], count: int) -> list[Any]:
    return random.Random(seed).sample(rows, min(count, len(rows)))


def measure(work: Path, trained: Path) -> dict[str, Any]:
    """Train in `trained` unless it was, then score the grid and the lengths that fit."""
    run = RunConfig()
    if not (trained / "done").exists():
        shutil.rmtree(trained / "run", ignore_errors=True)  # of a run that was stopped
        argv = ["--data", str(trained), "--output", str(trained / "run"), *TRAINING]
        assert train_main([*argv, "--device", "cpu", "--precision", "fp32"]) == 0
        (trained / "done").touch()
    model, tokenizer = load_model("pocket-bart", torch.device("cpu")), load_tokenizer("pocket-bart")
    minilora.load_adapter(model, trained / "run" / "adapter", inference=True)

    def read(split: str) -> tuple[list[Example], list[Encoded]]:
        rows = map(json.loads, (work / f"{split}.jsonl").read_text().splitlines())
        examples = [Example(row["id"], row["dialogue"], row["summary"]) for row in rows]
        return examples, encode(examples, tokenizer, run.data)[0]

    lengths = [len(row.target) + 1 for row in read("train")[1]]
    fitted, _ = fit_lengths(run.generation, lengths, ())
    chosen = {name: getattr(fitted, name) for name in GRID}
    examples, encoded = read("validation")
    file = work / "measured.jsonl"
    rows = read_lines(file)

    def score(settings: dict[str, Any]) -> dict[str, Any]:
        for row in rows:
            if settings.items() <= row.items():
                return row
        written = summarize(model, tokenizer, encoded, replace(run.generation, **settings))
        scores = rouge([summary.text for summary in written], [e.summary for e in examples])
        rouge1 = sum(row["rouge1"] for row in scores) / len(scores)
        tokens = sum(summary.tokens for summary in written) / len(written)
        rows.append({**settings, "rouge1": round(rouge1, 2), "gen_len": round(tokens, 1)})
        with file.open("a") as lines:
            lines.write(json.dumps(rows[-1]) + "\n")
        return rows[-1]

    mine = score(chosen)
    cells = (dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values()))
    grid = [score(cell) for cell in cells if cell["min_length"] <= cell["max_length"]]
    best = max(grid, key=lambda row: float(row["rouge1"]))
    lost = round(best["rouge1"] - mine["rouge1"], 2)
    rows_of = {"train": len(lengths), "validation": len(examples)}
    result = {"chosen": mine, "best": best, "lost": lost, "within": lost <= MARGIN}
    return {"dialogues": rows_of, **result, "grid": grid}


if __name__ == "__main__":
    main()
