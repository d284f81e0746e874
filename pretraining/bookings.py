"""The easiest rung of the embedded data: chats with a service, and who wants what, found where.

    python pretraining/bookings.py PAIRS_SGD_RULE_SUMMARIES.jsonl.xz

Chooses 1,550 of the pairs whose summaries were made by rule from the annotations of the
Schema-Guided Dialogue data (Rastogi et al. 2020), and writes them as train, validation and test.
A pair is chosen by what its text is like, never by what a model does with it. The order is that
of a hash of the conversation, so the choice is the same on every machine.

Pre-training must see neither these chats with a summary nor this wording: `apart` says which pairs
it may read. Of the dialogues alone it reads none that are in bookings.
"""

import argparse
import hashlib
import json
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "minilora" / "summarization" / "assets" / "bookings"
SPLITS = {"validation": 150, "test": 200, "train": 1200}
MOST_OF_A_KIND = 260
CHAT_WORDS = range(40, 171)
SUMMARY_WORDS = range(10, 36)

# What a sentence may say. A name comes before it: a speaker, She or He.
COUNT = "(?:one|two|three|four|five|six)"
KINDS = {
    "restaurant": r"(?:is looking for|wants to find) an? .*restaurant",
    "hotel": r"is looking for an? (?:\w+-star )?hotel",
    "event": r"is looking for an? (?:\w+ ){0,2}(?:concert|event|game|play)\b",
    "travel": r"is looking for a (?:round trip )?(?:bus|train|flight)",
    "table": r"(?:reserves|books|will have) a table for",
    "room": rf"(?:reserves|books) {COUNT} rooms? at",
    "fare": rf"(?:buys|books|gets \w+) {COUNT} (?:bus|train) tickets?",
    "ticket": rf"(?:buys|gets \w+) {COUNT} tickets? for",
    "flight": r"books an? [\w ]+ flight",
    "car": r"(?:rents|wants to rent) an? .*car\b",
}
ANSWER = re.compile(r"(?:suggests|finds|recommends) ")
# The rung's wording, which no summary read in pre-training may have.
WORDING = re.compile(
    r"\b(?:looking for|to find|tickets?|table|rooms?|house|hotel|restaurant|rents?|car|flight)\b"
)

# What reads badly or is no fact of the chat.
CLUMSY = re.compile(
    r"(?:morning|afternoon|evening|night) \d|\b2019\b|[:;()\"#]\s|\.\.|[a-z]'S\b|, [Cc]a\b|, ca\b|"
    r"\b(\w+ \w+) (?:in|to) \1\b|\b(?:something|Unknown)\b|"
    r"\b(?:Chi-town|SD|ATL|LAX|SFO|PDX|PHX|LV|PHL)\b"
)

Rules = list[tuple[str, str | Callable[[re.Match[str]], str]]]
FORM: Rules = [  # before the choice
    (r"\bHalf past\b", "half past"),
    (r"\bQuarter (to|past)\b", r"quarter \1"),
    (r"(?<=\d) ?([AP])M\b", lambda found: " " + found[1].lower() + "m"),
    (r"\b(from|to|on|on the) (?=\d+(?:st|nd|rd|th)\b)", r"\1 the "),
    (r"\b(the )+", "the "),
    (r" V[sS] ", " vs "),
    (r"\bNext (?=[A-Z])", "next "),
    (
        r"\b(?:cantonese|sichuan|szechwan|hawaiian|izakaya)\b",
        lambda found: found[0].capitalize(),
    ),
    (
        r"\b(?:[Hh]ip Hop|Pasta|Seafood)(?= (?:restaurant|event|concert))",
        lambda found: found[0].lower(),
    ),
    (r"\bmoderate (?=[\w ]*restaurant)", "moderately priced "),
    (r"\ba SUV car\b", "an SUV"),
    (r"\b(wants to find|is looking for) a (?=[AEIO])", r"\1 an "),
    # "A is looking for a hotel. B suggests C." is one thought.
    (r"^(.*?\w)\. (\w+ (?:suggests|finds|recommends) )", r"\1, and \2"),
]
MISSPELT = re.compile("zcheuan")  # always; put right in the chats too
STYLE: Rules = [  # after it
    (
        r"\b(?:cambodian|christian|jamaican|laotian|latin|moroccan|nepalese|nicaraguan|oriental"
        r"|parisian|portuguese|punjabi|sicilian|southern|szechuan)\b",
        lambda found: found[0].capitalize(),
    ),
    (r"\bmiddle eastern\b", "Middle Eastern"),
    (r"\bmoderate tex-Mex\b", "moderately priced Tex-Mex"),
    (r"\btex-Mex\b", "Tex-Mex"),
    (r"\b(?:Fish|Brunch)(?= restaurant)", lambda found: found[0].lower()),
    (r"\b(burger|noodle|dumpling|snack)s restaurant\b", r"\1 restaurant"),
    (r"\b(diner|coffeehouse|gastropub) restaurant\b", r"\1"),
    (
        r"\b(rock|blues|pop|electronica|country|classical|jazz|hip hop|Christian|Latin) event\b",
        r"\1 concert",
    ),
    (r"\b(baseball|basketball|football|soccer) event\b", r"\1 game"),
    (r"\b(from|to|on) day after tomorrow\b", r"\1 the day after tomorrow"),
    (r" (?:at )?(?:Afternoon|Evening) (\d[\d:]*)", r" at \1 pm"),
    (r"\ban European\b", "a European"),
    (r"\ba (?=Oriental\b)", "an "),
]


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[\w.)][.]) (?=[A-Z])", text)


def speakers(dialogue: str) -> list[str]:
    return list(dict.fromkeys(line.split(": ")[0] for line in dialogue.split("\n")))


def conversation(identity: str) -> str:
    """sgd-dev-13_00020-0 is part 0 of the conversation sgd-dev-13_00020."""
    return identity.rsplit("-", 1)[0]


def kinds(pair: dict[str, str]) -> list[str]:
    """What each sentence says; empty if one of them says something else."""
    who = "|".join([*map(re.escape, speakers(pair["dialogue"])), "She", "He"])
    found: list[str] = []
    for sentence in sentences(pair["summary"]):
        start = re.match(rf"(?:{who}) ", sentence)
        said = sentence[start.end() :] if start else ""
        kind = next((kind for kind, form in KINDS.items() if re.match(form, said)), "")
        if ANSWER.match(said) and found:
            continue
        if not kind:
            return []
        found.append(kind)
    return found


def polished(summary: str, rules: Rules) -> str:
    for form, better in rules:
        summary = re.sub(form, better, summary)
    return summary


def proper(summaries: Iterable[str]) -> set[str]:
    """Words that these summaries write with a capital more often than without one."""
    seen = Counter(word for text in summaries for word in re.findall(r"[A-Za-z][\w']*", text))
    return {
        word.lower()
        for word, count in seen.items()
        if word[0].isupper() and count > seen[word.lower()]
    }


def supported(summary: str, dialogue: str) -> bool:
    """Every number and every word with a capital stands in the chat."""
    there = set(re.findall(r"\w+", dialogue.lower()))
    return all(word.lower() in there for word in re.findall(r"\b[A-Z\d]\w*", summary))


def wording(pair: dict[str, str]) -> str:
    """The summary without its speakers, numbers and dates: what no two pairs may share."""
    text = pair["summary"]
    for name in speakers(pair["dialogue"]):
        text = re.sub(rf"\b{re.escape(name)}\b", "NAME", text)
    return re.sub(rf"\b(?:{COUNT}|\d\w*|She|He)\b", "N", text)


# A place or a thing without its capital: "in san jose". The words are what else may stand there.
PLACE = re.compile(r"\b(?:in|at|from|to|for|finds|suggests|recommends) (?=[a-z])(\w+)")
BEFORE_PLACE = re.compile(
    "a|an|the|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|half|quarter|noon|"
    "today|tomorrow|next|this|later|day|find|rent"
)


def written(pair: dict[str, str], names: set[str]) -> bool:
    """Short, in proper capitals, and nothing in it that the chat does not say."""
    summary, dialogue = pair["summary"], pair["dialogue"]
    if len(dialogue.split()) not in CHAT_WORDS or len(summary.split()) not in SUMMARY_WORDS:
        return False
    # A part of a longer chat that breaks off with a question about the next thing.
    last = dialogue.rsplit("\n", 1)[-1]
    if last.endswith("?") and not re.search(r"else|assist|help|more", last):
        return False
    if len(sentences(summary)) > 2 or CLUMSY.search(summary) or not summary.isascii():
        return False
    if not all(BEFORE_PLACE.fullmatch(word) for word in PLACE.findall(summary)):
        return False
    if any(word in names for word in re.findall(r"(?<![\w'])[a-z]\w+", summary)):
        return False
    return supported(summary, dialogue) and dialogue.isascii()


def choose(pairs: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """The splits: one pair of a conversation, one of a wording, so many of a kind."""
    names = proper(pair["summary"] for pair in pairs)
    order = sorted(pairs, key=lambda pair: hashlib.sha256(pair["id"].encode()).hexdigest())
    taken: set[str] = set()
    count: Counter[str] = Counter()
    chosen = []
    for pair in order:
        said = kinds(pair)
        pair = pair | {"summary": polished(pair["summary"], FORM)}
        marks = {conversation(pair["id"]), wording(pair)}
        if not said or count[" ".join(said)] >= MOST_OF_A_KIND or taken & marks:
            continue
        if written(pair, names):
            taken |= marks
            count[" ".join(said)] += 1
            spelled = {key: MISSPELT.sub("zechuan", text) for key, text in pair.items()}
            text = polished(spelled["summary"], STYLE)
            chosen.append({"id": pair["id"], "dialogue": spelled["dialogue"], "summary": text})
    print(f"{len(chosen):,} of {len(pairs):,} pairs can be chosen")
    chosen.sort(key=lambda pair: hashlib.sha256(pair["id"][::-1].encode()).hexdigest())
    splits, start = {}, 0
    for split, size in SPLITS.items():
        splits[split] = chosen[start : start + size]
        start += size
    return splits


def apart(pair: dict[str, str], chosen: set[str]) -> bool:
    """Whether pre-training may read a pair: no part of a chosen chat, nor the rung's wording."""
    conversations = {conversation(identity) for identity in chosen}
    return conversation(pair["id"]) not in conversations and not WORDING.search(pair["summary"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--output", type=Path, default=ASSETS)
    given = parser.parse_args()
    with lzma.open(given.pairs, "rt", encoding="utf-8") as lines:
        pairs = [json.loads(line) for line in lines]
    given.output.mkdir(parents=True, exist_ok=True)
    for split, rows in choose(pairs).items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (given.output / f"{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
