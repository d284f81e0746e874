"""The list of common English words, counted from the texts of pre-training.

    python pretraining/words.py --texts FOLDER [FOLDER ...]

`minilora/summarization/assets/words.txt` tells a word from a non-word. The rule:

1. A word is letters with apostrophes inside, without a final 's. It counts where it stands in
   lower case, so that names stay out.
2. It is listed if it occurs in at least two collections, and three times in edited texts (books,
   prose, transcripts, the chats written for this project), so that the spelling mistakes of chats
   stay out.
3. Those of the most collections come first, then the most frequent, until the file has 200 KB.

A line is a word and the endings with which it occurs too: `bake d s -ing` is bake, baked, bakes
and baking; `-` takes the last letter away. An inflection that does not occur is not listed.
"""

import argparse
import json
import lzma
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

OUT = Path(__file__).parents[1] / "minilora" / "summarization" / "assets" / "words.txt"
MOST_BYTES = 200_000
LEAST_COLLECTIONS, LEAST_EDITED = 2, 3
# Not a part of a longer word, of a name or of an address.
WORD = re.compile(r"(?<![\w'@./-])[a-z]+(?:'[a-z]+)*(?![\w'@/-])")
ENDINGS = """-iness -iest ness -ers -est -ied -ier -ies -ily -ing ers est ing -er -ly ed er es ly rs
st -y d r s y"""
# Files of one collection, by how their names begin; every other file is its own.
COLLECTIONS = {
    "classic_books": "books",
    "crd3_transcripts": "crd3",
    "dialogue_summary_pairs": "crd3",
    "chat_synthetic": "persona",
    "pairs_spc": "persona",
    "pairs_sgd": "sgd",
    "sgd": "sgd",
}
EDITED = ("books", "crd3", "prose_", "sentences_", "qmsum", "pretraining")


def texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Every text file's collection and text; of pairs whatever is not an id."""
    for path in sorted([*folder.glob("*.xz"), *folder.glob("pretraining.jsonl")]):
        opened = lzma.open if path.suffix == ".xz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            text = file.read()
        if ".jsonl" in path.name:
            rows = map(json.loads, text.splitlines())
            keys = ("dialogue", "narrative", "summary")
            text = "\n".join(row[key] for row in rows for key in keys if key in row)
        name = next((c for start, c in COLLECTIONS.items() if path.name.startswith(start)), "")
        yield name or path.name, text.replace("’", "'")


def common(sources: Iterable[tuple[str, str]]) -> list[str]:
    """The words of the rule's first two points, in the order of the third."""
    of: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for collection, text in sources:
        of[collection].update(word.removesuffix("'s") for word in WORD.findall(text))
    count, spread, edited = Counter[str](), Counter[str](), Counter[str]()
    for collection, found in of.items():
        count.update(found)
        spread.update(found.keys())
        if collection.startswith(EDITED):
            edited.update(found)
    return sorted(
        (
            word
            for word in count
            if spread[word] >= LEAST_COLLECTIONS
            and edited[word] >= LEAST_EDITED
            and (len(word) > 1 or word in "ai")
        ),
        key=lambda word: (-spread[word], -count[word], word),
    )


def part(word: str, listed: set[str]) -> tuple[str, str] | None:
    """The listed word that this one inflects, and its ending."""
    for ending in ENDINGS.split():  # the longest first
        stem = word.removesuffix(ending.lstrip("-"))
        if stem == word or len(stem) < 3:
            continue
        if ending.startswith("-"):
            bases = [stem + "y"] if ending.startswith("-i") and ending != "-ing" else [stem + "e"]
        else:
            bases = [stem]
            if ending[0] in "ei" and stem[-1] == stem[-2]:  # swap ping
                bases.append(stem[:-1])
        for base in bases:
            if base in listed:
                return base, ending if ending.startswith("-") else word[len(base) :]
    return None


def lines(words: list[str]) -> list[str]:
    listed = set(words)
    endings: dict[str, list[str]] = {}
    for word in words:
        found = part(word, listed)
        if found and not part(found[0], listed):
            endings.setdefault(found[0], []).append(found[1])
        else:
            endings.setdefault(word, [])
    return sorted(" ".join([base, *sorted(ends)]) for base, ends in endings.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    given = parser.parse_args()
    words = common(pair for folder in given.texts for pair in texts(folder))
    found, low, high = "", 0, len(words)
    while low < high:  # the longest beginning that fits
        middle = (low + high + 1) // 2
        text = "\n".join(lines(words[:middle])) + "\n"
        if len(text) <= MOST_BYTES:
            found, low = text, middle
        else:
            high = middle - 1
    OUT.write_text(found, encoding="utf-8")
    print(f"{low:,} of {len(words):,} words in {len(found):,} bytes")


if __name__ == "__main__":
    main()
