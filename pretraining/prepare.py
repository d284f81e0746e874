"""Texts to examples: chats, prose, pairs and narratives, with persons as slots.

Writes four files of JSON Lines, `{chats,prose,pairs,narratives}.jsonl.xz`; each row has its split,
`train` or `heldout`. A slot is one of Unicode's private characters (`names.py`). Left out are the
chats and the summaries of the embedded data `bookings` (`--bookings`), and the wording of its
summaries (`reword.py`).

    python pretraining/prepare.py --texts ../shared/data --out build/pocket-bart/data
"""

import argparse
import json
import lzma
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
from crd3 import crd3, crd3_window
from names import FEMALE, MALE, SLOTS, slot
from pseudo import Turn, show
from reword import reword
from vary import CAPITAL, NOT_PLACES

HELD_OUT_EVERY = 50  # one text in so many is held out, the last of its source
ASSETS = Path(__file__).parents[1] / "minilora/summarization/assets"
GENDER = dict.fromkeys(FEMALE, "f") | dict.fromkeys(MALE, "m")
Row = dict[str, Any]

# Megabytes taken of each source of prose.
PROSE = {
    "pretraining2/prose_tinystories_pieces": 99,
    "pretraining2/prose_squality_summaries": 99,
    "pretraining2/prose_african_storybook_storyweaver": 99,
    "pretraining2/prose_fairytaleqa": 99,
    "pretraining2/sentences_wikisplit": 99,
    "pretraining2/prose_openstax_ccby": 4,
    "pretraining/classic_books_dialogue_1840_1928": 6,
}


def read(path: Path) -> str:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return file.read().replace("\r\n", "\n")


def passages(text: str) -> list[str]:
    """What blank lines separate."""
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def rows(path: Path) -> list[Row]:
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def lines(dialogue: str) -> list[tuple[str, str]]:
    """(speaker, text) of every turn."""
    pairs = (line.split(": ", 1) for line in dialogue.split("\n") if ": " in line)
    return [(speaker.strip(), text.strip()) for speaker, text in pairs]


def slots(names: list[str], told: str) -> dict[str, str]:
    """The slot of every name. A name of unknown gender stays where a pronoun would depend on it."""
    table: dict[str, str] = {}
    used: Counter[str] = Counter()
    for name in names:
        gender = GENDER.get(name, "x")
        unsure = gender == "x" and re.search(r"\b(?:he|she|his|her|him)\b", told, re.IGNORECASE)
        if re.fullmatch(r"[A-Z][a-z]+", name) and not unsure and used[gender] < SLOTS:
            table[name] = slot(gender, used[gender])
            used[gender] += 1
    return table


def mark(text: str, table: dict[str, str]) -> str:
    """The text with slots for names."""
    if not table:
        return text
    return re.sub(rf"\b({'|'.join(map(re.escape, table))})\b", lambda m: table[m[1]], text)


def named(conversation: str) -> list[Turn]:
    """The turns of a chat whose lines begin with names."""
    said = lines(conversation)
    table = slots(list(dict.fromkeys(who for who, _ in said)), "")
    return [
        Turn(table.get(who, who), GENDER.get(who, "x"), mark(text, table)) for who, text in said
    ]


def unnamed(conversation: str, rng: np.random.Generator) -> list[Turn]:
    """The turns of plain lines, given two speakers in turn, sometimes three."""
    genders = [str(rng.choice(["f", "m", "x"], p=[0.48, 0.48, 0.04])) for _ in range(3)]
    speakers = [slot(gender, person) for person, gender in enumerate(genders)]
    group = rng.random() < 0.15
    turns: list[Turn] = []
    who = 1
    for line in conversation.split("\n"):
        who = (who + int(rng.integers(1, 3))) % 3 if group else 1 - who
        if line.startswith(("User: ", "Assistant: ")):
            label, line = line.split(": ", 1)
            who = int(label == "Assistant")
        if line.strip():
            turns.append(Turn(speakers[who], genders[who], line.strip()))
    return turns


def embedded(bookings: Path) -> set[str]:
    """The long lines of the embedded service chats, by which they are known among the texts."""
    pairs = [pair for path in sorted(bookings.glob("*.jsonl")) for pair in rows(path)]
    return {text for pair in pairs for _, text in lines(pair["dialogue"]) if len(text.split()) > 9}


def chats(texts: Path, bookings: Path, rng: np.random.Generator) -> Iterator[tuple[str, Row]]:
    """(source, chat) of every conversation, its turns as [speaker, gender, text]."""
    taken = embedded(bookings)
    for name in (
        "chat_chitchat_byu",
        "chat_synthetic_persona_chat",
        "chat_topical_chat_valid_test",
    ):
        for conversation in passages(read(texts / f"pretraining2/{name}.txt.xz")):
            yield name, {"turns": named(conversation)}
    for name in ("self_dialogue", "sgd", "taskmaster4"):
        for conversation in passages(read(texts / f"pretraining/{name}.txt.xz")):
            said = [line.split(": ", 1)[-1] for line in conversation.split("\n")]
            if not (name == "sgd" and taken.intersection(said)):
                yield name, {"turns": unnamed(conversation, rng)}
    for meeting in passages(read(texts / "pretraining/qmsum_meetings.txt.xz")):
        said = lines(re.sub(r" ([.,?!'])", r"\1", meeting))
        for start in range(0, len(said), 120):  # a third of each meeting
            yield (
                "qmsum",
                {"turns": [Turn(who, "x", text) for who, text in said[start : start + 40]]},
            )
    told: set[str] = set()
    for row in rows(texts / "pretraining/dialogue_summary_pairs.jsonl.xz"):
        if row["source"] == "CRD3" and row["dialogue"] not in told:
            told.add(row["dialogue"])
            yield "crd3", {"turns": crd3(row, GENDER)[0]}


def pairs(texts: Path, bookings: Path, rng: np.random.Generator) -> Iterator[tuple[str, Row]]:
    """(source, pair): dialogue and summary with slots, and `kind`, which names the manner."""
    taken = {pair["id"].rsplit("-", 1)[0] for p in bookings.glob("*.jsonl") for pair in rows(p)}
    files = {"sgd": "service", "multiwoz": "service", "star": "service",
             "casino": "deal", "spc_persona": "facts"}  # fmt: skip
    for name, kind in files.items():
        rule = "" if name == "spc_persona" else "_rule"
        for row in rows(texts / f"pretraining2/pairs_{name}{rule}_summaries.jsonl.xz"):
            if row["id"].rsplit("-", 1)[0] in taken:
                continue
            summary = row["summary"]
            for _ in range(3 if kind == "service" else 1):  # several wordings
                told = reword(summary, rng) if kind == "service" else summary
                if len(told.split()) < 5:
                    continue
                table = slots(list(dict.fromkeys(who for who, _ in lines(row["dialogue"]))), told)
                dialogue = mark(row["dialogue"], table)
                yield name, {"kind": kind, "dialogue": dialogue, "summary": mark(told, table)}
    for row in rows(texts / "pretraining/dialogue_summary_pairs.jsonl.xz"):
        if row["source"] == "CRD3":
            turns, summary = crd3(row, GENDER)
            limits = [int(rng.integers(*words)) for words in ((60, 150), (120, 220))]
            windows = [crd3_window(turns, summary, limit) for limit in limits]
            found = {told: show(nearest) for nearest, told in windows}
        else:
            dialogue = re.sub(r" ([.,?!'])", r"\1", row["dialogue"])
            found = {row["summary"]: "\n".join(f"{who}: {text}" for who, text in lines(dialogue))}
        for told, dialogue in found.items():
            fits = 5 <= len(told.split()) <= 60 and len(dialogue.split()) <= 260
            if fits and "\n" in dialogue:
                kind = {"CRD3": "game", "QMSum": "meeting"}.get(row["source"], "visit")
                yield kind, {"kind": kind, "dialogue": dialogue, "summary": told}


def narratives(texts: Path) -> Iterator[tuple[str, Row]]:
    """Everyday chats, retold in two to four sentences (`narrative`) and in one (`summary`)."""
    for row in rows(texts / "plainchat/pretraining.jsonl"):
        table = slots(row["names"], row["narrative"] + row["summary"])
        fields = ("dialogue", "narrative", "summary")
        yield "plainchat", {field: mark(row[field], table) for field in fields}


def prose(texts: Path) -> Iterator[tuple[str, Row]]:
    for name, megabytes in PROSE.items():
        left = megabytes * 1_000_000
        for passage in passages(read(texts / f"{name}.txt.xz")):
            left -= len(passage)
            if left > 0:
                yield name, {"text": passage}


def write(path: Path, found: Iterator[tuple[str, Row]]) -> list[Row]:
    """Write the rows with their split: of each source the last fiftieth is held out."""
    by_source: dict[str, list[Row]] = defaultdict(list)
    for source, row in found:
        by_source[source].append(row)
    kept: list[Row] = []
    for source, group in by_source.items():
        cut = len(group) - len(group) // HELD_OUT_EVERY
        for place, row in enumerate(group):
            split = "train" if place < cut else "heldout"
            kept.append({"split": split, "source": source.split("/")[-1], **row})
        print(f"{path.name}: {len(group):,} of {source}", flush=True)
    with lzma.open(path, "wt", encoding="utf-8", preset=9) as file:
        for row in kept:
            file.write(json.dumps(row, ensure_ascii=False, default=astuple) + "\n")
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("build/pocket-bart/data"))
    parser.add_argument("--bookings", type=Path, default=ASSETS / "bookings")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    texts, out = arguments.texts, arguments.out
    out.mkdir(parents=True, exist_ok=True)
    told = write(out / "narratives.jsonl.xz", narratives(texts))
    found = write(out / "pairs.jsonl.xz", pairs(texts, arguments.bookings, rng))
    write(out / "chats.jsonl.xz", chats(texts, arguments.bookings, rng))
    write(out / "prose.jsonl.xz", prose(texts))
    seen = Counter(
        name
        for row in [*told, *found]
        if row["split"] == "train" and row.get("kind", "service") == "service"
        for name in CAPITAL.findall(row.get("narrative", row["summary"]))
    )
    places = sorted(name for name in seen if name not in NOT_PLACES and name not in GENDER)
    (out / "places.json").write_text(json.dumps(places, indent=0))
    print(f"{len(places)} places")


if __name__ == "__main__":
    main()
