"""A blind reading: which summaries are readable and right, by two readers who do not know whose.

    python benchmarks/reading.py sheet EVALUATION --out FOLDER
    python benchmarks/reading.py count EVALUATION FIRST.txt SECOND.txt
        --readers "who the first is" "who the second is"

EVALUATION is evaluation_NAME.json of pocket.py or, for drafts, evaluation.json of a run on the
validation split. `sheet` draws the dialogues and writes `sheet.md`, with the summaries of base,
fine-tuned and reference under each in a shuffled order, `instructions.md`, and `answers.txt` to
fill, a line a summary. A reader, a person or a language model, gets these three and nothing else.
Nowhere in them stands whose a summary is: `count` draws and shuffles again, from the same
evaluation and seed. It writes reading_NAME.json, where NAME is that of the data.

A summary counts only if both readers say so. If fewer than nine in ten references are found right
in all, the readers or the data are at fault, and the reading is void.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import WEIGHTS, write_result
from common import digest as digest_of_files

SIDES = ("base", "finetuned", "reference")
LETTERS = "ABC"
ANSWER = re.compile(r"[\s|*-]*(\d+)\.([A-C])[\s|,:]+(yes|no|y|n)[\s|,]+(all|part|no)[\s|]*", re.I)

INSTRUCTIONS = """# How to read

`sheet.md` holds {count} chats. Under each stand three summaries, A, B and C, in no order. Read the
chat, then each summary for itself; judge what it says, not how much it says or how well it sounds.
Give two answers about every summary:

1. **Readable**, `y` or `n`. `y`: one or more complete, grammatical sentences without an invented
   word. Short or plain is fine.
2. **Right**, `all`, `part` or `no`.
   - `all`: every statement is in the chat, and the main point of the chat is there.
   - `part`: the main point is right, and at most one statement is wrong.
   - `no`: anything else.

   Another person, time, place or number than in the chat is a wrong statement.

What plainly follows from the chat is in the chat. A summary need not mention everything. The two
answers are independent: a sentence can be broken and right, or fluent and wrong.

Fill `answers.txt`, one line for each summary, nothing else on the line, none left out:

    1.A y all
    1.B n no
    1.C y part
"""


class SheetError(ValueError):
    """What is wrong with a file, where, and what to do."""


def draw(path: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """The dialogues of an evaluation to read, each with the side behind every letter."""
    try:
        evaluation = json.loads(path.read_bytes())
        examples = [
            {key: str(row[key]) for key in ("id", "dialogue", *SIDES)}
            for row in evaluation["examples"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SheetError(f"{path}: not an evaluation.json of evaluate.py ({error})") from None
    if not examples:
        raise SheetError(f"{path}: holds no dialogue")
    weights = digest_of_files([WEIGHTS])
    if evaluation.get("weights", weights) != weights:  # pocket.py names them, train.py does not
        raise SheetError(f"{path}: is of earlier weights of pocket-bart: run pocket.py again")
    generator = random.Random(seed)
    chosen = generator.sample(examples, min(count, len(examples)))
    for row in chosen:
        row["sides"] = generator.sample(SIDES, len(SIDES))
    return chosen


def sheet(chosen: Sequence[dict[str, Any]]) -> str:
    parts = []
    for number, row in enumerate(chosen, 1):
        chat = "\n".join(f"> {line}  " for line in row["dialogue"].splitlines())
        lines = "\n".join(
            f"- **{number}.{letter}** {' '.join(row[side].split()) or '(empty)'}"
            for letter, side in zip(LETTERS, row["sides"], strict=True)
        )
        parts.append(f"## {number}\n\n{chat}\n\n{lines}\n")
    return "\n".join(parts)


def write_sheet(chosen: Sequence[dict[str, Any]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    blank = [f"{n}.{letter}\n" for n in range(1, len(chosen) + 1) for letter in LETTERS]
    (folder / "sheet.md").write_text(sheet(chosen), encoding="utf-8")
    (folder / "instructions.md").write_text(INSTRUCTIONS.format(count=len(chosen)), "utf-8")
    (folder / "answers.txt").write_text("".join([f"# sheet {digest(chosen)}\n", *blank]), "utf-8")


def digest(chosen: Sequence[dict[str, Any]]) -> str:
    """Of the sheet and of pocket-bart's weights: answers to other ones are not counted."""
    return digest_of_files([WEIGHTS], sheet(chosen))[:12]


def read_answers(path: Path, count: int) -> dict[tuple[int, str], tuple[bool, str]]:
    """A filled sheet: by number and letter whether it is readable, and right in all, part or no."""
    answers: dict[tuple[int, str], tuple[bool, str]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SheetError(f"{path}: cannot be read ({error})") from None
    for place, line in enumerate(lines, 1):
        if not line.strip() or line.startswith(("#", "```")):
            continue
        found = ANSWER.fullmatch(line)
        if not found:
            raise SheetError(f"{path} line {place}: {line[:40]!r} is not like '1.A y part'")
        number, letter, readable, right = found.groups()
        key = int(number), letter.upper()
        if not 1 <= key[0] <= count:
            raise SheetError(f"{path} line {place}: the sheet has no {number}, only 1 to {count}")
        if key in answers:
            raise SheetError(f"{path} line {place}: {number}.{letter} is answered a second time")
        answers[key] = readable.lower().startswith("y"), right.lower()
    every = [(n, letter) for n in range(1, count + 1) for letter in LETTERS]
    if missing := [f"{n}.{letter}" for n, letter in every if (n, letter) not in answers]:
        raise SheetError(f"{path}: {len(missing)} answers are missing, first {missing[0]}")
    return answers


def kappa(first: Sequence[object], second: Sequence[object]) -> float | None:
    """Cohen's kappa (1960): agreement beyond chance; None where both always say the same one."""
    n = len(first)
    agreed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    one, two = Counter(first), Counter(second)
    chance = sum(one[value] * two[value] for value in one) / n**2
    return (agreed - chance) / (1 - chance) if chance < 1 else None


def count(
    chosen: Sequence[dict[str, Any]],
    first: dict[tuple[int, str], tuple[bool, str]],
    second: dict[tuple[int, str], tuple[bool, str]],
) -> dict[str, Any]:
    """What both readers say of each side, and how far they agree."""
    keys: dict[str, list[tuple[int, str]]] = {side: [] for side in SIDES}
    for number, row in enumerate(chosen, 1):
        for letter, side in zip(LETTERS, row["sides"], strict=True):
            keys[side].append((number, letter))

    def tally(side: str, *readers: dict[tuple[int, str], tuple[bool, str]]) -> dict[str, int]:
        said = [[reader[key] for reader in readers] for key in keys[side]]
        return {
            "readable": sum(all(readable for readable, _ in both) for both in said),
            "right": sum(all(right == "all" for _, right in both) for both in said),
            "right_or_in_part": sum(all(right != "no" for _, right in both) for both in said),
        }

    agreement = {}
    for name, at in (("readable", 0), ("right", 1)):
        one, two = ([reader[key][at] for key in first] for reader in (first, second))
        same = sum(a == b for a, b in zip(one, two, strict=True)) / len(one)
        agreement[name] = {"agreed": same, "kappa": kappa(one, two)}
    results = {side: tally(side, first, second) for side in SIDES}
    return {
        "n": len(chosen),
        "void": results["reference"]["right"] < 0.9 * len(chosen),
        "results": results,
        "of_each_reader": [{side: tally(side, one) for side in SIDES} for one in (first, second)],
        "agreement": agreement,
        "answers": [
            {
                "id": row["id"],
                **{
                    side: [
                        f"{'y' if one[0] else 'n'} {one[1]}" for one in (first[key], second[key])
                    ]
                    for side in SIDES
                    for key in (keys[side][number],)
                },
            }
            for number, row in enumerate(chosen)
        ],
    }


def main() -> None:
    flags = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flags.add_argument("command", choices=["sheet", "count"])
    flags.add_argument("evaluation", type=Path, help="evaluation.json of a run")
    flags.add_argument("answers", type=Path, nargs="*", help="the two filled sheets, to count")
    flags.add_argument("--out", type=Path, default=Path("build/reading"), help="of the sheet")
    flags.add_argument("--count", type=int, default=100, help="dialogues")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--readers", nargs=2, help="who they are: a person, or which language model")
    options = flags.parse_args()
    try:
        chosen = draw(options.evaluation, options.count, options.seed)
        if options.command == "sheet":
            write_sheet(chosen, options.out)
            print(f"{options.out}: {len(chosen)} chats; fill answers.txt, once for each reader")
            return
        if len(options.answers) != 2 or not options.readers:
            raise SheetError("count needs two filled answers.txt, and --readers, who they are")
        first, second = (read_answers(path, len(chosen)) for path in options.answers)
        for path in options.answers:
            if f"# sheet {digest(chosen)}\n" not in path.read_text(encoding="utf-8"):
                message = "not of this sheet: the evaluation, weights, --count or --seed are others"
                raise SheetError(f"{path} is {message}, or its line '# sheet ...' was removed")
    except SheetError as error:
        flags.exit(2, f"{error}\n")
    counted = count(chosen, first, second)
    evaluation = json.loads(options.evaluation.read_bytes())
    name = Path(evaluation["data"]).name
    settings = {"data": name, "split": evaluation["split"], "weights": digest_of_files([WEIGHTS])}
    settings |= {"seed": options.seed, "readers": options.readers}
    path = write_result(f"reading_{name}", {"settings": settings, **counted})
    for side, row in counted["results"].items():
        print(f"{side:10} of {counted['n']}: " + ", ".join(f"{k} {v}" for k, v in row.items()))
    print(f"{'void: too few references are right' if counted['void'] else 'valid'}; {path}")


if __name__ == "__main__":
    main()
