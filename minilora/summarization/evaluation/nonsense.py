"""Measures that see nonsense, which ROUGE does not: what a summary says and its dialogue does not.

Four shares of the summaries, each with its bootstrap interval:

- foreign names: a capitalised word, not at a sentence's start, that is not in the dialogue.
  Weekdays, months and nationalities are no names; case, accents and 's do not matter.
- foreign numbers: a number or time that is not in the dialogue as digits, word or clock form
  (4, four, 4 pm, 16:00; half past four, 4:30). "One", "first" and "second" alone are left out;
  where the dialogue has them, a bare 1 or 2 is no foreign number.
- non-words: neither in the dialogue nor in `assets/words.txt`, a list of common English words.
  What is a name by the first rule is not looked up. This finds invented words, and names that
  are not in the dialogue at a sentence's start.
- repeats: a phrase said twice in a row ("the the", "a cake and a cake", "Tom and Tom"), or the same
  three words twice in a sentence, capitalised ones left out; not what the dialogue says so.

They tell nothing about texts that are not in Latin letters, and are then not computed. Texts in
other languages with Latin letters are measured by these rules of English.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache

from ..presets import ASSETS
from .numerals import NUMBER_WORDS, numbers, straight
from .rouge import Interval, bootstrap, split_sentences

MEASURES = ("foreign_names", "foreign_numbers", "non_words", "repeats")

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_WITH_DIGITS = re.compile(r"\w*\d\w*")
_TOKEN = re.compile(r"[\w'-]+(?:[:.,]\d+)*")  # numbers too, and hyphens within
_CLITIC = re.compile(r"'(?:s|ll|d|ve|re|m)$")
# Capitalised in English without being names: weekdays, months, nationalities, a.m. and p.m.
_NO_NAMES = frozenset((ASSETS / "not_names.txt").read_text(encoding="utf-8").split())


def _plain(word: str) -> str:
    """A word as it is compared: without case, accents and 's."""
    letters = unicodedata.normalize("NFKD", _CLITIC.sub("", word.casefold()))
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def _words(text: str) -> set[str]:
    """The words of a text to compare with; what holds a digit is a number."""
    return {_plain(word) for word in _WORD.findall(_WITH_DIGITS.sub(" ", straight(text)))}


def _names_nobody(word: str) -> bool:
    return not {_plain(word), _plain(word).removesuffix("s")}.isdisjoint(_NO_NAMES)


@cache
def common_words() -> frozenset[str]:
    """`assets/words.txt`: a line is a word and its endings; `-` takes its last letter away."""
    words = set()
    for line in (ASSETS / "words.txt").read_text(encoding="utf-8").splitlines():
        base, *endings = line.split()
        words.add(base)
        words.update(base[:-1] + e[1:] if e.startswith("-") else base + e for e in endings)
    return frozenset(map(_plain, words))


def _told_apart(summary: str) -> Iterator[tuple[str, bool]]:
    """The summary's words, and whether each is a name."""
    for sentence in split_sentences(straight(summary)).splitlines():
        start = 0  # where the sentence's first word is; a quotation starts one too
        text = _WITH_DIGITS.sub(lambda found: "0" * len(found[0]), sentence)
        for found in _WORD.finditer(text):
            word, before = found[0], text[start : found.start()]
            first = start == 0 or re.search(r'[:"]\s*$| \'$', before)
            start = found.end()
            if len(_plain(word)) > 1:  # a letter alone: a.m., 5 m, I, I'll
                name = word[0].isupper() and not first
                yield word, name and not _names_nobody(word)


def foreign_names(summary: str, dialogue: str) -> list[str]:
    there = _words(dialogue)
    return [word for word, name in _told_apart(summary) if name and _plain(word) not in there]


def non_words(summary: str, dialogue: str) -> list[str]:
    known = _words(dialogue) | common_words() | NUMBER_WORDS
    words = (word for word, name in _told_apart(summary) if not name)
    return [word for word in words if _plain(word) not in known and not _names_nobody(word)]


def foreign_numbers(summary: str, dialogue: str) -> list[str]:
    there = {name for _, names in numbers(dialogue) for name in names}
    said, words = _words(dialogue), (("one", "1"), ("first", "1"), ("second", "2"))
    bare = {digit for word, digit in words if word in said}
    return [n for n, names in numbers(summary) if n not in bare and not names & there]


def repeats(summary: str, dialogue: str = "") -> list[str]:
    said = " ".join(_TOKEN.findall(straight(dialogue).casefold()))
    found = set()
    for sentence in split_sentences(straight(summary)).splitlines():
        for clause in re.split(r"[,;:](?=\s)", sentence):
            doubled = _doubled(_TOKEN.findall(clause))
            found |= {word for word in doubled if f"{word} {word}".casefold() not in said}
        words = _TOKEN.findall(sentence)
        runs = [" ".join(words[i : i + 3]) for i in range(len(words) - 2)]
        low = [run for run in runs if run == run.lower() and not re.search(r"\d", run)]
        found |= {run for run in low if low.count(run) > 1}
    return sorted(found)


def _doubled(words: list[str]) -> Iterator[str]:
    """Phrases of up to four words that follow themselves, at once or after "and" or "or"."""
    if len(words) > 1 and words[1] == words[0].lower():
        words = [words[1], *words[1:]]  # The the
    for i, word in enumerate(words):
        for n in range(1, 5):
            phrase, rest = words[i : i + n], words[i + n :]
            if rest[:1] in (["and"], ["or"]) and (n > 1 or word[0].isupper()):
                rest = rest[1:]  # but "more and more"
            if rest[:n] == phrase and phrase not in (["that"], ["had"]) and phrase != [word[0]]:
                yield " ".join(phrase)


def in_latin_letters(texts: Sequence[str]) -> bool:
    """Whether at least half of the letters are Latin."""
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    return 2 * sum("LATIN" in unicodedata.name(letter, "") for letter in letters) >= len(letters)


def shares(summaries: Sequence[str], dialogues: Sequence[str]) -> dict[str, Interval] | None:
    """Per cent of the summaries with each kind of nonsense; None: not in Latin letters."""
    if not in_latin_letters([*summaries, *dialogues]):
        return None
    pairs = list(zip(summaries, dialogues, strict=True))
    kinds = (foreign_names, foreign_numbers, non_words, repeats)
    return {
        name: bootstrap([100.0 * bool(kind(*pair)) for pair in pairs])
        for name, kind in zip(MEASURES, kinds, strict=True)
    }
