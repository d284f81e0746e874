"""Texts to packed uint16 arrays: prose, chats, pseudo-summaries and dialogue-summary pairs.

Held out, and never seen in training: whole novels, whole conversations, whole episodes (CRD3) and
meetings (QMSum). `heldout.json` beside the arrays records which. Names are slots (`names.py`); a
slot is the number FIRST + 2 * slot + (1 if a space precedes it), above every token.

    python pretraining/prepare.py --texts ../shared/data/pretraining --out build/pocket-bart/data
"""

import argparse
import json
import lzma
import re
from collections import Counter
from pathlib import Path

import numpy as np
from names import FIRST_SLOT, GENDERS, SLOT, SLOTS, harvest, slot
from pseudo import Turn, content, summarize
from tokenizers import Tokenizer

FIRST = 60_000  # the first number of a slot in the packed arrays
HELD_OUT_NOVELS = 4
HELD_OUT_EVERY = 50  # one conversation, medical dialogue or passage in so many
HELD_OUT_EPISODES = 20  # one CRD3 episode or QMSum meeting in so many

# Players of CRD3 and the characters they play, in the first and second campaign: one slot for both,
# since the summaries name the characters and the transcripts' turns begin with the players' names.
PLAYERS = {
    "C1": {"Laura": ("f", "Vex'ahlia", "Vex"), "Liam": ("m", "Vax'ildan", "Vax"),
           "Marisha": ("f", "Keyleth"), "Taliesin": ("m", "Percival", "Percy"),
           "Sam": ("m", "Scanlan", "Taryon", "Tary"), "Travis": ("m", "Grog"),
           "Ashley": ("f", "Pike"), "Orion": ("m", "Tiberius"), "Matt": ("m", "Matthew")},
    "C2": {"Laura": ("f", "Jester"), "Liam": ("m", "Caleb"), "Marisha": ("f", "Beauregard", "Beau"),
           "Taliesin": ("m", "Mollymauk", "Molly", "Caduceus"), "Sam": ("f", "Nott"),
           "Travis": ("m", "Fjord"), "Ashley": ("f", "Yasha"), "Matt": ("m", "Matthew")},
}  # fmt: skip
CAPITAL = re.compile(r"(?<![.!?\"] )(?<!^)\b[A-Z][a-z]{2,}(?:'[a-z]+)?\b", re.MULTILINE)


def read(texts: Path, name: str) -> str:
    """One text, its line ends normalised."""
    with lzma.open(texts / name, "rt", encoding="utf-8") as file:
        return file.read().replace("\r\n", "\n")


class Packer:
    """Encode texts with slots into one flat uint16 array and offsets."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        pieces: list[str] = []
        plans: list[list[int]] = []  # a piece's index, or -1 - slot number
        for text in texts:
            plan: list[int] = []
            end = 0
            for match in SLOT.finditer(text):
                if match.start() > end:
                    plan.append(len(pieces))
                    pieces.append(text[end : match.start()])
                number = 2 * (ord(match.group(2)) - FIRST_SLOT) + bool(match.group(1))
                plan.append(-1 - number)
                end = match.end()
            if end < len(text):
                plan.append(len(pieces))
                pieces.append(text[end:])
            plans.append(plan)
        encoded = [
            encoding.ids
            for encoding in self.tokenizer.encode_batch(pieces, add_special_tokens=False)
        ]
        return [
            np.array(
                [
                    token
                    for step in plan
                    for token in (encoded[step] if step >= 0 else [FIRST - 1 - step])
                ],
                dtype=np.uint16,
            )
            for plan in plans
        ]

    def save(self, path: Path, **columns: list[str]) -> None:
        """Write `tokens` and `offsets` of each column of texts."""
        arrays: dict[str, np.ndarray] = {}
        for column, texts in columns.items():
            encoded = self.encode(texts)
            arrays[f"{column}_offsets"] = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
            flat = np.concatenate(encoded) if encoded else np.zeros(0, np.uint16)
            arrays[f"{column}_tokens"] = flat
        np.savez(path, **arrays)  # type: ignore[arg-type]
        sizes = ", ".join(f"{len(v) / 1e6:.2f} M {k}" for k, v in arrays.items() if "tokens" in k)
        print(f"{path.name}: {len(texts)} texts, {sizes}", flush=True)


def casual(text: str, rng: np.random.Generator) -> str:
    """Sometimes type as in a messenger: no full stop at the end, lower case."""
    draw = rng.random()
    if draw < 0.35 and text.endswith(".") and not text.endswith(".."):
        text = text[:-1]
    if draw < 0.2:
        text = text.lower()
    return text


def chat(lines: list[str], rng: np.random.Generator) -> list[Turn]:
    """Give plain lines named speakers: two in turn, sometimes three; a label decides who speaks."""
    genders = [str(rng.choice(["f", "m", "x"], p=[0.48, 0.48, 0.04])) for _ in range(3)]
    speakers = [slot(gender, person) for person, gender in enumerate(genders)]
    group = rng.random() < 0.15
    turns: list[Turn] = []
    who = 1
    for line in lines:
        who = (who + int(rng.integers(1, 3))) % 3 if group else 1 - who
        if line.startswith(("User: ", "Assistant: ")):
            label, line = line.split(": ", 1)
            who = int(label == "Assistant")
        if line.strip():
            turns.append(Turn(speakers[who], genders[who], line.strip()))
    return turns


def spoken(passage: str) -> list[str]:
    """What the persons of a novel say, a paragraph a line, without `said Ann` and the narration."""
    lines: list[str] = []
    for paragraph in passage.split("\n"):
        line = " ".join(re.findall(r'"([^"]+)"', paragraph))
        # A comma closes speech that `said Ann` interrupts or ends.
        for end in set(re.findall(r'([^" ]+),"', paragraph)):
            line = re.sub(rf"{re.escape(end)},(?= [A-Z]|$)", f"{end}.", line)
        if len(line.split()) > 1:
            lines.append(line.strip())
    return lines


def show(turns: list[Turn]) -> str:
    """A dialogue as a messenger exports it."""
    return "\n".join(f"{turn.speaker}: {turn.text}" for turn in turns)


def windows(turns: list[Turn], rng: np.random.Generator, words: int = 170) -> list[list[Turn]]:
    """Cut a conversation into stretches of 3 to 14 turns and at most `words` words."""
    found: list[list[Turn]] = []
    start = 0
    while start < len(turns):
        size = int(rng.integers(4, 15))
        end, length = start, 0
        while end < min(start + size, len(turns)) and length < words:
            length += len(turns[end].text.split())
            end += 1
        if end - start >= 3 and length <= words + 60:
            found.append(turns[start:end])
        start = end
    return found


def crd3(pair: dict[str, str], genders: dict[str, str]) -> tuple[list[Turn], str]:
    """Turns and summary of a CRD3 pair, its persons as slots.

    Players become their characters; other capitalised words of the summary stay as they are.
    """
    campaign = "C1" if "-C1E" in pair["id"] else "C2"
    table: dict[str, tuple[str, str]] = {}
    used: Counter[str] = Counter()
    for player, (gender, *characters) in PLAYERS[campaign].items():
        person = slot(gender, used[gender])
        used[gender] += 1
        for name in (player, *characters):
            table[name] = (person, gender)
    lines = [line.split(": ", 1) for line in pair["dialogue"].split("\n") if ": " in line]
    for name in (line[0] for line in lines):
        if name not in table and re.fullmatch(r"[A-Z][a-z]+", name) and used["x"] < SLOTS:
            gender = genders.get(name, "x")
            if used[gender] < SLOTS:
                table[name] = (slot(gender, used[gender]), gender)
                used[gender] += 1
    longest_first = sorted(map(re.escape, table), key=len, reverse=True)
    names = re.compile(rf"\b({'|'.join(longest_first)})\b")

    def mark(text: str) -> str:
        return names.sub(lambda match: table[match.group(1)][0], text)

    turns = []
    for name, text in lines:
        speaker, gender = table.get(name, (mark(name), "x"))
        text = re.sub(r"\((?:[a-z ,'-]+)\) ?", "", mark(text)).strip()
        if text:
            turns.append(Turn(speaker, gender, text))
    return turns, mark(pair["summary"])


def unknown(dialogue: str, sentence: str) -> bool:
    """Whether a sentence names somebody or something that the dialogue does not."""
    people = {match.group(2) for match in SLOT.finditer(sentence)}
    return any(name not in dialogue for name in [*people, *CAPITAL.findall(sentence)])


def nearest(turns: list[Turn], summary: str, words: int = 220) -> list[Turn]:
    """The consecutive turns, at most `words` long, that share most words with the summary."""
    wanted = {word[:5] for word in content(summary)}
    best: tuple[int, int, int] = (-1, 0, 0)
    for start in range(len(turns)):
        end, length = start, 0
        seen: set[str] = set()
        while end < len(turns):
            length += len(turns[end].text.split())
            if length > words:
                break
            seen |= {turns[end].speaker, *(word[:5] for word in content(turns[end].text))}
            end += 1
        best = max(best, (len(seen & wanted), -start, end))
    return turns[-best[1] : best[2]]


def faithful(dialogue: str, summary: str, least: float = 0.25) -> str:
    """The summary's sentences that the dialogue supports: known names, `least` of the words shared.

    A sentence that begins with a pronoun goes with the sentence before it.
    """
    kept: list[str] = []
    follows = True
    for sentence in re.findall(r"\S.*?[.!?]+(?=\s|$)|\S.*$", summary):
        pronoun = re.match(r"(?:she|he|they|it|her|his|their|this|to|and|but)\b", sentence, re.I)
        good = (
            not unknown(dialogue, sentence)
            and overlap(dialogue, sentence) >= least
            and re.match("[A-Z\ue000-\ue02f]", sentence)
            and sentence.count('"') % 2 == 0
            and not re.search(r"\bQ:|[()\[\]]", sentence)
        )
        follows = bool(good and (follows or not pronoun))
        if follows and (kept or not pronoun):
            kept.append(sentence)
    return " ".join(kept)


def crd3_window(turns: list[Turn], summary: str, words: int) -> tuple[list[Turn], str]:
    """The turns nearest to a summary, and what of it they support: nothing if it names nobody."""
    turns = nearest(turns, summary, words)
    summary = faithful(show(turns), summary)
    return turns, summary if SLOT.search(summary) else ""


def overlap(dialogue: str, summary: str) -> float:
    """The share of the summary's content words that occur in the dialogue, names apart."""
    words = {word[:5] for word in content(SLOT.sub("", summary))}
    there = {word[:5] for word in content(dialogue)}
    return len(words & there) / max(len(words), 1)


def passages(text: str) -> list[str]:
    """What blank lines separate."""
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=Path, default=Path("../shared/data/pretraining"))
    parser.add_argument("--tokenizer", type=Path, default=Path("build/pocket-bart/tokenizer.json"))
    parser.add_argument("--out", type=Path, default=Path("build/pocket-bart/data"))
    parser.add_argument("--prose", type=int, default=100_000, help="characters of each novel")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    packer = Packer(Tokenizer.from_file(str(arguments.tokenizer)))
    held: dict[str, list[str]] = {}

    def save(split: str, name: str, **columns: list[str]) -> None:
        packer.save(arguments.out / f"{split}-{name}.npz", **columns)

    # Novels: whole ones held out; speech passages that quote a held-out novel go too.
    novels = passages(read(arguments.texts, "classic_books_1860_1928.txt.xz"))
    speech = passages(read(arguments.texts, "classic_books_dialogue_1840_1928.txt.xz"))
    last, novels = novels[-HELD_OUT_NOVELS:], novels[:-HELD_OUT_NOVELS]
    held["novels"] = [novel[:80] for novel in last]
    forbidden = {line for novel in last for line in novel.split("\n") if len(line) > 40}
    speech = [part for part in speech if not forbidden & set(part.split("\n"))]
    cut = len(speech) - len(speech) // HELD_OUT_EVERY
    held["speech"] = [f"the last {len(speech) - cut} passages"]
    speech_in_train = speech[: cut - 200]
    pool = harvest(line for part in speech_in_train for line in part.split("\n"))
    (arguments.out / "names.json").write_text(json.dumps(pool, indent=0))
    print({gender: len(names) for gender, names in pool.items()})
    save("train", "prose", text=[n[: arguments.prose] for n in novels] + speech_in_train)
    save("heldout", "prose", text=[n[: arguments.prose] for n in last] + speech[cut:])

    # Chats: conversations in a messenger's shape, and what the rules make of them.
    chats: dict[str, list[str]] = {"train": [], "heldout": []}
    pseudo: dict[str, list[tuple[str, str]]] = {"train": [], "heldout": []}

    def add(split: str, turns: list[Turn]) -> None:
        for stretch in windows(turns, rng):
            typed = [Turn(t.speaker, t.gender, casual(t.text, rng)) for t in stretch]
            chats[split].append(show(typed))
            summary = summarize(stretch, rng)
            if summary:
                pseudo[split].append((show(typed), summary))

    for name in ("self_dialogue", "sgd", "taskmaster4"):
        conversations = passages(read(arguments.texts, f"{name}.txt.xz"))
        # Each source repeats itself nearby (one worker, one service): hold out its end.
        cut = len(conversations) - len(conversations) // HELD_OUT_EVERY
        held[name] = [f"the last {len(conversations) - cut} of {len(conversations)} conversations"]
        for place, conversation in enumerate(conversations):
            add("train" if place < cut else "heldout", chat(conversation.split("\n"), rng))

    for passage in speech_in_train:
        add("train", chat(spoken(passage), rng))

    # Pairs: episodes and meetings held out whole.
    pairs: dict[str, list[tuple[str, str]]] = {"train": [], "heldout": []}
    rows = [json.loads(line) for line in read(arguments.texts, "dialogue_summary_pairs.jsonl.xz")
            .splitlines()]  # fmt: skip

    def group(row: dict[str, str]) -> str:
        found = re.search(r"C\dE\d+", row["id"])
        return found.group() if found else row["id"].rsplit("-", 1)[0] if row["id"].startswith(
            "qmsum") else row["id"]  # fmt: skip

    groups = sorted({group(row) for row in rows if not row["id"].startswith("mts")})
    out = set(groups[HELD_OUT_EPISODES // 2 :: HELD_OUT_EPISODES])
    mts = sorted({row["id"] for row in rows if row["id"].startswith("mts")})
    out |= set(mts[HELD_OUT_EPISODES // 2 :: HELD_OUT_EPISODES])
    held["pairs"] = sorted(out)
    genders = {name: g for g in "fm" for name in pool[g]}
    dropped: Counter[str] = Counter()
    told: set[str] = set()
    for row in rows:
        split = "heldout" if group(row) in out else "train"
        if row["source"] == "CRD3":
            turns, summary = crd3(row, genders)
            if row["dialogue"] not in told:
                told.add(row["dialogue"])
                add(split, turns)
            # Two windows, so that a summary that comes again comes with another source.
            found = [crd3_window(turns, summary, int(rng.integers(*words)))
                     for words in ((60, 150), (120, 220))]  # fmt: skip
            found = found[:1] if found[0] == found[1] else found
        else:
            lines = [line.split(": ", 1) for line in row["dialogue"].split("\n") if ": " in line]
            turns = [Turn(who, "x", re.sub(r" ([.,?!'])", r"\1", text).strip())
                     for who, text in lines if text.strip()]  # fmt: skip
            found = [(turns, row["summary"])]
        for turns, summary in found:
            words = len(summary.split())
            reason = (
                "long summary" if words > 60 else
                "no supported sentence" if words < 5 else
                "long dialogue" if len(show(turns).split()) > 280 else
                "one turn" if len(turns) < 2 else ""
            )  # fmt: skip
            if reason:
                dropped[reason] += 1
            else:
                pairs[split].append((show(turns), summary))
    print(f"pairs dropped: {dict(dropped)}")
    for split in ("train", "heldout"):
        save(split, "chat", text=chats[split])
        save(split, "pseudo", text=[p[0] for p in pseudo[split]],
             summary=[p[1] for p in pseudo[split]])  # fmt: skip
        save(split, "pairs", text=[p[0] for p in pairs[split]],
             summary=[p[1] for p in pairs[split]])  # fmt: skip
    held["genders of slots"] = [f"{GENDERS}: {SLOTS} each"]
    (arguments.out / "heldout.json").write_text(json.dumps(held, indent=1))


if __name__ == "__main__":
    main()
