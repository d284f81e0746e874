"""Pseudo-summaries of dialogues by rules: gap sentences retold in the third person.

PEGASUS (Zhang et al. 2020, section 3.1) learns to summarize by generating the sentences that share
most words with the rest of a text. In a dialogue such a sentence is a turn; here it is retold by a
few rules ("Ann: I love my dog" -> "Ann loves her dog."), a question with its answer becomes a
statement, and the dialogue stays whole. The model must find the salient turns, copy names and
content words, and change the person.
"""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from names import words


@dataclass(frozen=True)
class Turn:
    """One speaker's line; `speaker` is a name or a slot, `gender` one of f, m, x."""

    speaker: str
    gender: str
    text: str


def show(turns: list[Turn]) -> str:
    """A dialogue as a messenger exports it."""
    return "\n".join(f"{turn.speaker}: {turn.text}" for turn in turns)


PRONOUNS = {
    "f": {"i": "she", "me": "her", "my": "her", "mine": "hers", "myself": "herself"},
    "m": {"i": "he", "me": "him", "my": "his", "mine": "his", "myself": "himself"},
    "x": {"i": "they", "me": "them", "my": "their", "mine": "theirs", "myself": "themselves"},
}
STOP = set(
    words(
        """a an the and or but if so of to in on at by for with from as is are was were be been
am do does did have has had i you he she it we they me him her us them my your his its our their
this that these those what which who how when where why not no yes yeah ok okay oh well just
like really very too also can could will would should may might there here then than about up
out all some any one i'm i've i'll i'd you're it's that's don't didn't he's she's they're we're
um uh hmm know think get got go going good great sure please thanks thank"""
    )
)
BASE = set(
    words(
        """think like want need love know hope guess feel believe remember see go work live play
watch read prefer enjoy agree wish hate wonder mean say look get take make use try plan find
give tell ask come buy eat drink run walk cast attack move grab pull put turn open start hear
understand suppose keep start stop help pay listen write learn have do stay wait own miss care
drive sit stand leave throw hold follow reach jump touch pick roll draw rush pass swing push
head slap point nod smile travel appreciate recommend require search wear call talk speak sleep
cook own collect let get show send confirm book check add set reserve pick choose bring meet
keep"""
    )
)
SLOT_AT_START = re.compile("[\ue000-\ue02f]")
WORD = re.compile(r"[A-Za-z\ue000-\ue02f']+|\d+|[^\sA-Za-z\d]|\s+")
SENTENCE = re.compile(r"(?:[^.!?]|(?<=\d)\.(?=\d))+[.!?]*")
LEAD = re.compile(
    r"^(?:(?:well|oh|ok|okay|yeah|yes|yep|no|nope|sure|so|and|but|alright|all right|right|hi|hello|"
    r"hey|great|cool|thanks|thank you|um|uh|hmm|wow|haha|lol|i see|true|exactly|also|actually|"
    r"honestly|perfect|please)\b[ ,.!-]*)+",
    re.IGNORECASE,
)
YES = re.compile(
    r"^(?:yes|yeah|yep|yup|sure|i do\b|of course|definitely|absolutely|i am\b|i have\b)",
    re.IGNORECASE,
)
NO = re.compile(r"^(?:no\b|nope|nah|not really|i don't\b|i haven't\b|never)", re.IGNORECASE)
YOU_QUESTION = re.compile(
    r"^(do|did|are|were|have|can|could|would|will) you (?:please |also |really )?(.+?)\?*$",
    re.IGNORECASE,
)
WH_QUESTION = re.compile(
    r"^(what|where|when|who|how|why|which)\b(.{6,})\?$", re.IGNORECASE | re.DOTALL
)


def third(verb: str) -> str:
    """The third person singular of a present-tense verb."""
    special = {
        "have": "has",
        "do": "does",
        "go": "goes",
        "am": "is",
        "don't": "doesn't",
        "haven't": "hasn't",
        "was": "was",
    }
    if verb in special:
        return special[verb]
    if verb.endswith(("s", "x", "ch", "sh", "z")):
        return verb + "es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"


def conjugated(verb: str) -> str:
    """`third` for verbs known to stand in their base form; others (past tense) as they are."""
    low = verb.lower()
    if low in BASE or low in {"am", "don't", "haven't"}:
        return third(low)
    return verb


CONTRACTIONS = [
    (r"\bi'?m\b", "I am"), (r"\bi've\b", "I have"), (r"\bi'll\b", "I will"),
    (r"\bi'd\b", "I would"), (r"\byou're\b", "you are"), (r"\byou've\b", "you have"),
    (r"\byou'll\b", "you will"), (r"\byou'd\b", "you would"), (r"\bwe're\b", "we are"),
    (r"\bwe've\b", "we have"), (r"\bwe'll\b", "we will"), (r"\bdont\b", "don't"),
    (r"\bam\s+not\b", "am not"),
]  # fmt: skip
ADVERBS = {"really", "just", "also", "always", "never", "still", "actually", "only", "even", "kind",
           "definitely", "usually", "already", "probably", "sometimes", "do"}  # fmt: skip


def retell(text: str, me: Turn, you: Turn | None) -> str:
    """Rewrite one sentence of `me`, addressed to `you`, in the third person."""
    for pattern, plain in CONTRACTIONS:
        text = re.sub(pattern, plain, text, flags=re.IGNORECASE)
    mine, named, named_you = PRONOUNS[me.gender], False, False
    out: list[str] = []
    pieces = WORD.findall(text)
    conjugate = ""  # the subject just written, whose verb comes next
    previous = ""
    for piece in pieces:
        low = piece.lower()
        if piece.isspace():
            out.append(piece)
            continue
        if low == "i":
            word = mine["i"] if named else me.speaker
            conjugate = "" if word == "they" else "i"
            if previous in {"am", "was", "have"} and word != "they":
                conjugate = ""
            named = True
        elif low in mine:
            word = mine[low] if named or low != "my" else me.speaker + "'s"
            named, conjugate = True, ""
        elif you and low == "you":
            subject = previous in {
                "",
                "if",
                "that",
                "when",
                "and",
                "but",
                ",",
                "as",
                "because",
                "what",
                "think",
                "hope",
                "do",
                "did",
                "where",
                "how",
            }
            word = PRONOUNS[you.gender]["i" if subject else "me"] if named_you else you.speaker
            conjugate = "you" if subject and word != "they" else ""
            named_you = True
        elif you and low == "your":
            word = PRONOUNS[you.gender]["my"] if named_you else you.speaker + "'s"
            named_you, conjugate = True, ""
        elif you and low == "yourself":
            word, conjugate = PRONOUNS[you.gender]["myself"], ""
        elif low in {"we", "us", "our", "ours"}:
            word = {"we": "they", "us": "them", "our": "their", "ours": "theirs"}[low]
            conjugate = ""
        elif conjugate and low in ADVERBS - {"do"}:
            word = piece
        elif conjugate:
            word = {"am": "is", "are": "is", "were": "was"}.get(low) or conjugated(piece)
            conjugate = ""
        else:
            word = piece
        out.append(word)
        previous = low
    return "".join(out).strip()


def indirect(question: str) -> str:
    """The word order of an indirect question: "where are you" to "where you are"."""
    question = re.sub(r"\bdo you\b", "you", question)
    return re.sub(
        r"\b(are|were|have|can|could|will|would|should|is|was) (you|it|this|that|he|she|there)\b",
        r"\2 \1",
        question,
    )


def content(text: str) -> set[str]:
    """The words that carry meaning."""
    words = (word.lower() for word in re.findall(r"[A-Za-z\ue000-\ue02f]+|\d+", text))
    return {word for word in words if word not in STOP and (len(word) > 2 or word.isdigit())}


def finish(sentence: str) -> str:
    """A capital at the start, one full stop at the end."""
    sentence = re.sub(r"\s+", " ", sentence).strip(" ,;:-.!?\"'")
    return sentence[:1].upper() + sentence[1:] + "."


def candidates(turns: list[Turn]) -> list[tuple[int, str, str]]:
    """(turn, the speaker it is about, retold sentence) of every sentence the rules can retell."""
    found: list[tuple[int, str, str]] = []
    speakers = list(dict.fromkeys(turn.speaker for turn in turns))
    for place, turn in enumerate(turns):
        other = next((t for t in turns if t.speaker != turn.speaker), None)
        if len(speakers) > 2:
            other = None
        following = turns[place + 1] if place + 1 < len(turns) else None
        for raw in SENTENCE.findall(turn.text):
            sentence = LEAD.sub("", raw.strip()).strip()
            count = len(sentence.split())
            if not 4 <= count <= 24:
                continue
            asked = YOU_QUESTION.match(sentence)
            if asked and following and following.speaker != turn.speaker:
                verb, rest = asked.group(1).lower(), asked.group(2)
                if YES.match(following.text) and verb != "did":
                    said = {"do": f"I {rest}", "are": f"I am {rest}", "were": f"I was {rest}",
                            "have": f"I have {rest}"}.get(verb, f"I {verb} {rest}")  # fmt: skip
                    said = re.sub(r"\byou\b", "I", re.sub(r"\byour\b", "my", said))
                    found.append((place, following.speaker, retell(said, following, turn)))
                elif NO.match(following.text) and verb in {"do", "did", "have", "are"}:
                    word = {"do": "doesn't", "did": "didn't", "have": "hasn't", "are": "isn't"}
                    said = f"{following.speaker} {word[verb]} {rest}"
                    said = re.sub(r"\byour\b", PRONOUNS[following.gender]["my"], said)
                    found.append((place, following.speaker, retell(said, following, None)))
                elif verb in {"can", "could", "would", "will"}:
                    said = f"{turn.speaker} asks {following.speaker} to {rest}"
                    said = re.sub(r"\bme\b", PRONOUNS[turn.gender]["me"], said)
                    said = re.sub(r"\bmy\b", PRONOUNS[turn.gender]["my"], said)
                    said = re.sub(r"\byour\b", PRONOUNS[following.gender]["my"], said)
                    found.append((place, turn.speaker, said))
            elif sentence.endswith("?"):
                asked = WH_QUESTION.match(sentence)
                if asked and count <= 14:
                    retold = retell(indirect(sentence), turn, other)
                    retold = retold[:1].lower() + retold[1:]
                    start = f"{turn.speaker} asks {other.speaker}" if other else (
                        f"{turn.speaker} asks")  # fmt: skip
                    found.append((place, turn.speaker, f"{start} {retold}"))
            elif sentence.split()[0].lower() in BASE - {"hope", "guess", "wish"}:
                retold = retell(sentence, turn, other)
                whom = other.speaker if other else "them"
                found.append(
                    (place, turn.speaker,
                     f"{turn.speaker} asks {whom} to {retold[:1].lower()}{retold[1:]}")
                )  # fmt: skip
            elif re.match(r"(?:i|i'm|i've|i'll|i'd|im|my)\b", sentence, re.IGNORECASE):
                found.append((place, turn.speaker, retell(sentence, turn, other)))
            elif re.search(r"\b(?:i|i'm|i've|i'll|i'd|my)\b", sentence, re.IGNORECASE):
                retold = retell(sentence, turn, other)
                found.append((place, turn.speaker, retold))
            elif count >= 5 and other is not None:
                retold = retell(sentence, turn, other)
                retold = retold if sentence[:1] != sentence[:1].upper() or re.match(
                    r"I\b", sentence) else retold[:1].lower() + retold[1:]  # fmt: skip
                verb = ("tells " + other.speaker + " that") if place % 2 else "says that"
                if re.match(
                    r"(?:it|that|the|there|he|she|they|this|we|you|a)\b", retold, re.IGNORECASE
                ) or re.match("[\ue000-\ue02f]", retold):
                    found.append((place, turn.speaker, f"{turn.speaker} {verb} {retold}"))
    return found


def summarize(turns: list[Turn], rng: np.random.Generator, longest: int = 40) -> str | None:
    """One to three salient sentences in the order of the dialogue, or None if the rules find none.

    A sentence's salience is the F1 overlap of its content words with the rest of the dialogue, plus
    a share for its own information (rare words); adjacent sentences about one speaker are joined.
    """
    found = candidates(turns)
    if not found:
        return None
    counts: Counter[str] = Counter()
    for turn in turns:
        counts.update(content(turn.text))
    scored: list[tuple[float, int]] = []
    for index, (_, _, sentence) in enumerate(found):
        words = content(sentence)
        shared = sum(counts[word] > 1 for word in words)
        informative = min(len(words), 8)
        scored.append((2.0 * shared / (len(words) + 4) + 0.08 * informative
                       + 0.1 * float(rng.random()), index))  # fmt: skip
    scored.sort(reverse=True)
    wanted = int(rng.choice([1, 2, 3], p=[0.35, 0.45, 0.2]))
    chosen: list[int] = []
    length = 0
    for _, index in scored:
        place, _, sentence = found[index]
        extra = len(sentence.split())
        if any(found[other][0] == place for other in chosen) or length + extra > longest:
            continue
        if any(len(content(sentence) & content(found[o][2])) > len(content(sentence)) / 2
               for o in chosen):  # fmt: skip
            continue
        chosen.append(index)
        length += extra
        if len(chosen) == wanted:
            break
    if not chosen:
        return None
    out: list[str] = []
    last = ""
    gender = {turn.speaker: turn.gender for turn in turns}
    for index in sorted(chosen):
        _, speaker, sentence = found[index]
        sentence = finish(sentence)
        if speaker == last and sentence.startswith(speaker + " "):
            rest = sentence[len(speaker) + 1 :]
            if len(out[-1].split()) < 14 and rng.random() < 0.5:
                out[-1] = f"{out[-1][:-1]} and {rest}"
                continue
            if gender[speaker] != "x":
                sentence = PRONOUNS[gender[speaker]]["i"].capitalize() + " " + rest
        elif out and len(out[-1].split()) < 12 and rng.random() < 0.5:
            joint = str(rng.choice([" and ", ", and ", ", but ", ", while ", ", so "]))
            out[-1] = out[-1][:-1] + joint + (
                sentence if SLOT_AT_START.match(sentence) else sentence[:1].lower() + sentence[1:]
            )  # fmt: skip
            last = speaker
            continue
        out.append(sentence)
        last = speaker
    return " ".join(out)
