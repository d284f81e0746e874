"""Lesson 8: the whole run. Texts in, scores and texts out."""


def rouge1(summary: str, reference: str) -> tuple[float, float, float]:
    """Precision, recall and F1, each in [0, 1]; all 0 where a text has no word or none is shared.

    Words are what `text.lower().split()` gives. A word that one text has twice and the other three
    times is shared twice.
    """
    raise NotImplementedError


def lead(dialogue: str, turns: int) -> str:
    """What is said in the first turns (lines "Name: words"), without names, joined by spaces."""
    raise NotImplementedError


def invented_numbers(summary: str, dialogue: str) -> list[str]:
    """Numbers of the summary that are not in the dialogue.

    A number is a run of digits, whatever is next to it ("5:45," has 5 and 45), or a whole word from
    "two" to "twelve", in upper or lower case ("often" has none). A number that occurs twice is in
    the result twice.
    "two" is not invented if the dialogue has "2", nor "2" if it has "two". The result has the order
    and the spelling of the summary.
    """
    raise NotImplementedError
