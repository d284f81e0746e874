"""Did pre-training see what it is tested on? Overlaps of eight words with its texts.

    python pretraining/overlap.py --texts build/pocket-bart/data --held NAME=FILE [...]

`--texts` are the texts as `prepare.py` writes them, or the raw ones. Every run of eight words
(lower case, without marks, speaker labels left out) of the held-out files is looked for in them.
All known names, and the slots of prepared texts, count as the same word.
Eight words can agree by chance: "i don't know what you're talking about" does. So the counts are
given for each source, with the most frequent runs beside them, and how many held-out chats share a
run of sixteen, which tells more.
"""

import argparse
import json
import lzma
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from names import FEMALE, MALE, SLOT_CHARACTER

NAMES = {name.lower() for name in (*FEMALE, *MALE)}
ENDINGS = {".xz", ".json", ".jsonl", ".txt"}
WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)*")
LABEL = re.compile(r"^[^:\n]{1,40}: ", re.M)
EIGHT, SIXTEEN = 8, 16


def runs(text: str, length: int = EIGHT) -> Iterator[str]:
    text = SLOT_CHARACTER.sub("x", LABEL.sub("", text.replace("’", "'")).lower())
    words = [
        "x" + word[len(name) :] if (name := word.split("'")[0]) in NAMES else word
        for word in WORD.findall(text)
    ]
    yield from (" ".join(words[i : i + length]) for i in range(len(words) - length + 1))


def rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """A file's documents: each one's id ("" if it has none) and its texts."""
    opened: Any = lzma.open if path.suffix == ".xz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        text = file.read()
    if ".json" not in path.name:
        yield from (("", [document]) for document in text.split("\n\n"))
        return
    lines = (
        json.loads(text) if text.lstrip().startswith("[") else map(json.loads, text.splitlines())
    )
    for row in lines:
        if isinstance(row, str):  # places.json
            yield "", [row]
            continue
        texts = [row[key] for key in ("dialogue", "narrative", "summary", "text") if row.get(key)]
        if "turns" in row:  # [speaker, gender, text]
            texts.append(" ".join(turn[-1] for turn in row["turns"]))
        yield str(row.get("id", "")), texts


def held_out(path: Path, length: int) -> dict[str, set[str]]:
    """The runs of a held-out file, each with the ids of the chats that have it."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for number, (identity, texts) in enumerate(rows(path)):
        for text in texts:
            for run in runs(text, length):
                found[run].add(identity or str(number))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="files or folders")
    parser.add_argument("--held", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--show", type=int, default=5, help="the most frequent runs of a pair")
    parser.add_argument("--json", type=Path, help="write the counts there")
    given = parser.parse_args()
    held = {name: Path(path) for name, _, path in (told.partition("=") for told in given.held)}
    eight = {name: held_out(path, EIGHT) for name, path in held.items()}
    sixteen = {name: held_out(path, SIXTEEN) for name, path in held.items()}
    chats = {name: sum(1 for _ in rows(path)) for name, path in held.items()}
    files = [
        file
        for path in given.texts
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if not path.is_dir() or file.suffix in ENDINGS
    ]
    if not files:
        raise SystemExit(f"no texts in {', '.join(map(str, given.texts))}")
    report: dict[str, dict[str, Any]] = {}
    for file in files:
        seen = {name: Counter[str]() for name in held}
        long: dict[str, set[str]] = {name: set() for name in held}
        for _, texts in rows(file):
            for text in texts:
                here = list(runs(text))
                for name, known in eight.items():
                    seen[name].update(run for run in here if run in known)
                if len(here) > EIGHT:
                    for run in runs(text, SIXTEEN):
                        for name, known in sixteen.items():
                            long[name] |= known.get(run, set())
        for name in held:
            common = {run: len(eight[name][run]) for run in seen[name]}
            report[f"{file.name} / {name}"] = {
                "runs": len(common),
                "of": len(eight[name]),
                "chats_with_one": len(set().union(*(eight[name][run] for run in common), set())),
                "chats_with_sixteen": len(long[name]),
                "chats": chats[name],
                "most": seen[name].most_common(given.show),
            }
            row = report[f"{file.name} / {name}"]
            if row["runs"]:
                print(
                    f"{file.name:44} {name:22} {row['runs']:6,} of {row['of']:9,} runs "
                    f"({row['runs'] / row['of']:.4%}), {row['chats_with_one']:,} chats, "
                    f"{row['chats_with_sixteen']:,} with sixteen words"
                )
                for run, count in row["most"]:
                    print(f"        {count:5,} x {run}")
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
