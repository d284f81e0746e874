"""Pairs of role-play transcripts (CRD3), as far as their dialogues support the summaries."""

import re
from collections import Counter

from names import SLOT, SLOTS, slot
from pseudo import Turn, content, show

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
