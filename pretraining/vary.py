"""Slots for what a summary copies: numbers, clock times, weekdays, months and places.

The same change is made in the chat and in its summary each time the pair is drawn, so that none of
them can be learnt by heart. (Persons are slots too: `names.py`.)
"""

import re

import numpy as np

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September",
          "October", "November", "December"]  # fmt: skip
SHORT_DAYS = [day[:3] for day in DAYS]
DAY = re.compile(r"\b(" + "|".join([*DAYS, *SHORT_DAYS]) + r")(s?)\b", re.IGNORECASE)
# "May" and "March" are words too: a month stands beside a number or after "in".
MONTH = re.compile(
    r"(\d(?:st|nd|rd|th)?(?: of)? |\bin |\bof )(" + "|".join(MONTHS) + r")\b|"
    r"\b(" + "|".join(MONTHS) + r")(?= (?:the )?\d)"
)  # fmt: skip
ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
        "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
        "nineteen", "twenty"]  # fmt: skip
TENS = {20: "twenty", 30: "thirty", 40: "forty", 50: "fifty", 60: "sixty", 70: "seventy",
        80: "eighty", 90: "ninety"}  # fmt: skip
VALUES = {word: value for value, word in enumerate(ONES)} | {w: v for v, w in TENS.items()}
NUMBER = re.compile(r"\d+|\b(?:" + "|".join(sorted(VALUES, key=len, reverse=True)) + r")\b", re.I)
CAPITAL = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{3,}\b")
NOT_PLACES = {*DAYS, *MONTHS, *SHORT_DAYS, "English", "Mrs", "Christmas", "Easter"}


def value(text: str) -> int:
    """A number written in digits or as a word."""
    return int(text) if text.isdigit() else VALUES[text.lower()]


def like(text: str, number: int) -> str:
    """A number written as `text` is: in digits or as a word, with a capital or without."""
    if text.isdigit() or (number > 20 and number not in TENS):
        return str(number)
    word = ONES[number] if number <= 20 else TENS[number]
    return word.capitalize() if text[0].isupper() else word


def another(number: int, rng: np.random.Generator) -> int:
    """Another number of the same kind: of a clock or a count, of minutes, of as many digits."""
    if number < 2:
        return number
    if number <= 12:
        return int(rng.integers(2, 13))
    if number < 60:
        low, high = (13, 24) if number < 24 else (24, 60)  # an hour of the day, or more
        return int(rng.integers(low, high))
    low = 10 ** (len(str(number)) - 1)
    return int(rng.integers(max(low, 60), 10 * low))


def shift(text: str, wheel: list[str], by: int) -> str:
    """The weekday or month `by` places on, written as `text` is."""
    place = [name.lower() for name in wheel].index(text.lower())
    moved = wheel[(place + by) % len(wheel)]
    return moved if text[0].isupper() else moved.lower()


def vary(texts: list[str], places: list[str], rng: np.random.Generator) -> list[str]:
    """A chat and what is told of it, with other numbers, days, months and places in all of them.

    Numbers stay where the summary has one that the chat lacks: it was reckoned.
    """
    chat, told = texts[0], " ".join(texts[1:])
    days, months = int(rng.integers(7)), int(rng.integers(12))

    def day(found: re.Match[str]) -> str:
        wheel = DAYS if len(found[1]) > 3 else SHORT_DAYS
        return shift(found[1], wheel, days) + found[2]

    def month(found: re.Match[str]) -> str:
        return (found[1] or "") + shift(found[2] or found[3], MONTHS, months)

    change = [lambda text: MONTH.sub(month, text)]
    named = [{name[0].lower()[:3] for name in DAY.findall(text)} for text in (told, chat)]
    words = re.search(r"\b(?:sun|sat|mon|wed)\b", " ".join(texts))  # no days, or typed as if
    if named[0] <= named[1] and not words:
        change.append(lambda text: DAY.sub(day, text))
    known = {value(text) for text in NUMBER.findall(chat) if len(text) < 9}
    wanted = {value(text) for text in NUMBER.findall(told) if len(text) < 9}
    if wanted and wanted - {0, 1} <= known:
        table = {number: another(number, rng) for number in wanted}
        if len({*table.values(), *(known - wanted)}) == len(known | wanted):  # still told apart

            def number(found: re.Match[str]) -> str:
                text = found[0]
                if len(text) >= 9 or value(text) not in table or text.startswith("0"):
                    return text
                return like(text, table[value(text)])

            change.append(lambda text: NUMBER.sub(number, text))
    names = {name for name in CAPITAL.findall(told) if name in chat} - NOT_PLACES
    if places and rng.random() < 0.5:
        for name in sorted(names)[:4]:
            other = places[int(rng.integers(len(places)))]
            pattern = re.compile(rf"\b{name}\b")
            change.append(lambda text, p=pattern, o=other: p.sub(o, text))
    for apply in change:
        texts = [apply(text) for text in texts]
    return texts
